//! What is known of Consul's services, and what of it is ready to be published.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::catalog::Catalog;
use crate::table::{Instance, Listing, Watch};

/// The state that watches bring together. Pure: it neither asks nor publishes.
#[derive(Debug, Default)]
pub struct Model {
    node: Node,
    names: Option<BTreeSet<Arc<str>>>,
    services: BTreeMap<Arc<str>, Known>,
    problems: BTreeMap<Subject, String>,
    /// Whether the catalog has changed since it was taken.
    is_dirty: bool,
    /// Whether a catalog has been taken.
    is_synced: bool,
}

/// The name under which the agent's own node registers its instances.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Node {
    /// Not answered yet.
    #[default]
    Unknown,
    /// The agent said it.
    Named(String),
    /// The token may not know it.
    Denied,
}

#[derive(Debug)]
enum Known {
    /// Nothing yet.
    Pending,
    /// All who bear this name are proxies and the like.
    NoService,
    /// These instances.
    Service { instances: Arc<[Instance]>, has_loopback: bool },
}

/// What a problem is about, the most telling first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The list of names.
    Names,
    /// The agent's own name.
    Agent,
    /// The number of connections.
    Connections,
    /// One service.
    Service(Arc<str>),
}

/// What a new list of names changes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Renamed {
    /// To be watched from now on.
    pub appeared: Vec<Arc<str>>,
    /// To be watched no more.
    pub gone: Vec<Arc<str>>,
}

const AGENT_DENIED: &str = "instances on a loopback address are unroutable, since the Consul token \
                            may not read which node this is: it needs agent:read as well";

impl Model {
    /// Takes the list of the names that have the tag.
    pub fn set_names(&mut self, names: BTreeSet<Arc<str>>) -> Renamed {
        let mut renamed = Renamed::default();
        self.services.retain(|name, _| {
            let stays = names.contains(name);
            if !stays {
                renamed.gone.push(name.clone());
                self.problems.remove(&Subject::Service(name.clone()));
                self.is_dirty = true;
            }
            stays
        });
        for name in &names {
            if !self.services.contains_key(name) {
                renamed.appeared.push(name.clone());
                self.services.insert(name.clone(), Known::Pending);
            }
        }
        self.is_dirty |= self.names.is_none();
        self.names = Some(names);
        renamed
    }

    /// Takes the instances of a service, or `None` where the name is no service's. A name that has
    /// gone meanwhile is ignored.
    pub fn set_service(&mut self, name: &Arc<str>, instances: Option<Vec<Instance>>) {
        let Some(known) = self.services.get_mut(name) else { return };
        self.is_dirty |= match instances {
            Some(instances) => known.learn(instances, &self.node),
            None => {
                let was_service = !matches!(known, Known::NoService);
                *known = Known::NoService;
                was_service
            }
        };
    }

    /// Takes the agent's word on which node it is.
    pub fn set_node(&mut self, node: Node) {
        // A name that is known stays: a token that may no more read it changes no node's name.
        if self.node == node || matches!((&self.node, &node), (Node::Named(_), Node::Denied)) {
            return;
        }
        self.node = node;
        for known in self.services.values_mut() {
            if let Known::Service { instances, .. } = known {
                let instances = instances.to_vec();
                self.is_dirty |= known.learn(instances, &self.node);
            }
        }
    }

    /// How many names are watched.
    pub fn n_services(&self) -> usize {
        self.services.len()
    }

    /// Whether the list of names has come.
    pub fn has_names(&self) -> bool {
        self.names.is_some()
    }

    /// Whether a catalog has been taken.
    pub fn is_synced(&self) -> bool {
        self.is_synced
    }

    /// Gives up waiting for those that haven't answered, so that the others can be published.
    pub fn stop_waiting(&mut self) {
        for (name, known) in &self.services {
            if let Known::Pending = known {
                self.problems.entry(Subject::Service(name.clone())).or_insert_with(|| {
                    "Consul hasn't said its instances; it joins when it does".into()
                });
            }
        }
        self.is_synced |= self.has_names();
    }

    /// The catalog, if it is ready and differs from the last one taken.
    pub fn take(&mut self) -> Option<Catalog> {
        let is_ready = self.is_synced || self.is_complete();
        if !(is_ready && self.is_dirty) {
            return None;
        }
        self.is_dirty = false;
        self.is_synced = true;
        let known = self.services.iter().filter_map(|(name, known)| match known {
            Known::Service { instances, .. } => {
                let instances = instances.clone();
                Some((name.clone(), Listing { instances, watch: Watch::Live }))
            }
            Known::Pending | Known::NoService => None,
        });
        Some(known.collect())
    }

    /// Whether everything has been answered once.
    fn is_complete(&self) -> bool {
        self.has_names()
            && self.node != Node::Unknown
            && !self.services.values().any(|known| matches!(known, Known::Pending))
    }

    /// Notes what is wrong, or no more wrong, with one part. Of a service that has gone it notes
    /// nothing.
    pub fn set_problem(&mut self, subject: Subject, problem: Option<String>) {
        if let Subject::Service(name) = &subject
            && !self.services.contains_key(name)
        {
            return;
        }
        match problem {
            Some(problem) => self.problems.insert(subject, problem),
            None => self.problems.remove(&subject),
        };
    }

    /// Whether Consul doesn't answer, rather than that something is wrong with an answer.
    pub fn is_failing(&self) -> bool {
        [Subject::Names, Subject::Agent].iter().any(|subject| self.problems.contains_key(subject))
    }

    /// All that is wrong, each complaint once, in one line; at most three.
    pub fn problem(&self) -> Option<String> {
        let mut complaints: Vec<(&str, Option<&str>)> = Vec::new();
        let mut n_more = 0;
        for (subject, problem) in &self.problems {
            let name = match subject {
                Subject::Service(name) => Some(name.as_ref()),
                Subject::Names | Subject::Agent | Subject::Connections => None,
            };
            if complaints.iter().any(|(said, _)| said == problem) {
                continue;
            }
            match complaints.len() {
                0..3 => complaints.push((problem, name)),
                _ => n_more += 1,
            }
        }
        if self.node == Node::Denied && self.has_loopback() {
            complaints.push((AGENT_DENIED, None));
        }
        let mut lines: Vec<String> = complaints
            .into_iter()
            .map(|(problem, name)| match name {
                Some(name) => format!("service `{name}`: {problem}"),
                None => problem.into(),
            })
            .collect();
        if n_more > 0 {
            lines.push(format!("and {n_more} more"));
        }
        (!lines.is_empty()).then(|| lines.join("; "))
    }

    fn has_loopback(&self) -> bool {
        self.services
            .values()
            .any(|known| matches!(known, Known::Service { has_loopback: true, .. }))
    }
}

impl Known {
    /// Takes the instances in, and says whether that changed anything; if not, the list stays the
    /// same allocation.
    fn learn(&mut self, mut instances: Vec<Instance>, node: &Node) -> bool {
        for instance in &mut instances {
            instance.local = matches!(node, Node::Named(name) if *name == instance.node);
        }
        instances.sort();
        if let Known::Service { instances: last, .. } = self
            && **last == *instances
        {
            return false;
        }
        let has_loopback = instances
            .iter()
            .any(|instance| instance.ip().is_some_and(|address| address.is_loopback()));
        *self = Known::Service { instances: instances.into(), has_loopback };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Says, Standing};

    fn names(list: &[&str]) -> BTreeSet<Arc<str>> {
        list.iter().map(|name| Arc::from(*name)).collect()
    }

    fn instance(node: &str, id: &str) -> Instance {
        Instance {
            node: node.into(),
            id: id.into(),
            address: "127.0.0.1".into(),
            port: 80,
            weight: 1,
            local: false,
            standing: Standing::Serving,
            says: Says::default(),
        }
    }

    fn synced(services: &[&str]) -> (Model, Catalog) {
        let mut model = Model::default();
        model.set_node(Node::Named("n1".into()));
        model.set_names(names(services));
        for name in services {
            model.set_service(&Arc::from(*name), Some(vec![instance("n1", "1")]));
        }
        let catalog = model.take().unwrap();
        (model, catalog)
    }

    #[test]
    fn nothing_is_published_before_all_have_answered() {
        let mut model = Model::default();
        let renamed = model.set_names(names(&["a", "b"]));
        assert_eq!(renamed.appeared.len(), 2);
        assert!(model.take().is_none());
        model.set_service(&"a".into(), Some(vec![instance("n1", "1")]));
        model.set_service(&"b".into(), None);
        assert!(model.take().is_none(), "the node's name is missing");
        model.set_node(Node::Named("n1".into()));
        let catalog = model.take().unwrap();
        assert_eq!(catalog.len(), 1, "b is a proxy's name");
        assert!(catalog["a"].instances[0].local);
        assert!(model.take().is_none());
    }

    #[test]
    fn an_empty_list_of_names_is_a_catalog() {
        let mut model = Model::default();
        model.set_node(Node::Denied);
        model.set_names(names(&[]));
        assert_eq!(model.take(), Some(Catalog::new()));
    }

    #[test]
    fn stragglers_are_named_and_join_later() {
        let mut model = Model::default();
        model.stop_waiting();
        assert!(model.take().is_none(), "without names there is nothing to publish");
        model.set_names(names(&["a", "b"]));
        model.set_service(&"a".into(), Some(Vec::new()));
        model.stop_waiting();
        assert_eq!(model.take().unwrap().len(), 1);
        assert!(model.problem().unwrap().starts_with("service `b`: Consul hasn't said"));
        model.set_problem(Subject::Service("b".into()), None);
        model.set_service(&"b".into(), Some(Vec::new()));
        assert_eq!(model.take().unwrap().len(), 2);
        assert_eq!(model.problem(), None);
    }

    #[test]
    fn what_did_not_change_is_shared_or_not_published_at_all() {
        let (mut model, first) = synced(&["a", "b"]);
        model.set_names(names(&["a", "b"]));
        model.set_node(Node::Named("n1".into()));
        model.set_service(&"a".into(), Some(vec![instance("n1", "1")]));
        assert!(model.take().is_none());

        model.set_service(&"a".into(), Some(vec![instance("n2", "1"), instance("n1", "2")]));
        let second = model.take().unwrap();
        assert!(Arc::ptr_eq(&first["b"].instances, &second["b"].instances));
        assert!(!Arc::ptr_eq(&first["a"].instances, &second["a"].instances));
        let order: Vec<_> =
            second["a"].instances.iter().map(|i| (&*i.node, &*i.id, i.local)).collect();
        assert_eq!(order, [("n1", "2", true), ("n2", "1", false)]);
    }

    #[test]
    fn a_name_that_goes_takes_its_service_along() {
        let (mut model, _) = synced(&["a", "b"]);
        let renamed = model.set_names(names(&["b", "c"]));
        assert_eq!(renamed.gone, ["a".into()]);
        assert_eq!(renamed.appeared, ["c".into()]);
        assert!(model.take().unwrap().keys().eq(&[Arc::from("b")]), "c joins when it answers");
        model.set_service(&"a".into(), Some(vec![instance("n1", "1")]));
        model.set_problem(Subject::Service("a".into()), Some("late".into()));
        assert!(model.take().is_none());
        assert_eq!(model.problem(), None);
    }

    #[test]
    fn a_new_node_name_moves_what_is_local() {
        let (mut model, _) = synced(&["a"]);
        model.set_node(Node::Named("n2".into()));
        assert!(!model.take().unwrap()["a"].instances[0].local);
    }

    #[test]
    fn a_node_that_is_known_stays_known() {
        let mut model = Model::default();
        model.set_names([Arc::from("a")].into());
        model.set_node(Node::Denied);
        model.set_service(&"a".into(), Some(vec![instance("n1", "1")]));
        assert!(!model.take().unwrap()["a"].instances[0].local);
        assert_eq!(model.problem().unwrap(), AGENT_DENIED);
        model.set_node(Node::Named("n1".into()));
        assert!(model.take().unwrap()["a"].instances[0].local);
        model.set_node(Node::Denied);
        assert!(model.take().is_none(), "an error takes nothing away");
        assert_eq!((model.problem(), model.is_failing()), (None, false));
    }

    #[test]
    fn complaints_are_told_once_and_the_first_three() {
        let (mut model, _) = synced(&["a", "b", "c", "d", "e"]);
        for name in ["a", "b"] {
            model.set_problem(Subject::Service(name.into()), Some("down".into()));
        }
        assert_eq!(model.problem().unwrap(), "service `a`: down");
        model.set_problem(Subject::Names, Some("down".into()));
        assert_eq!(model.problem().unwrap(), "down");
        for name in ["c", "d", "e"] {
            model.set_problem(Subject::Service(name.into()), Some(format!("bad {name}")));
        }
        let expected = "down; service `c`: bad c; service `d`: bad d; and 1 more";
        assert_eq!(model.problem().unwrap(), expected);
    }
}
