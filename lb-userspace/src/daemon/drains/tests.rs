use super::*;
use crate::config::Config;
use crate::table::vips::Vips;
use crate::table::{BackendState, Builder, Catalog, Instance, ServiceId, ServiceRecord, Watch};

fn instance(node: &str, id: &str, address: &str) -> Instance {
    Instance { node: node.into(), id: id.into(), address: address.into(), ..Instance::fixture() }
}

/// Services on three nodes, and the table of them.
struct Fleet {
    builder: Builder,
    catalog: Catalog,
    table: Arc<Table>,
    obstacles: Obstacles,
}

impl Fleet {
    fn new(drains: Arc<Drains>) -> Fleet {
        Fleet::with(drains, [])
    }

    /// With these services in addition.
    fn with<const N: usize>(drains: Arc<Drains>, others: [(&str, ServiceRecord); N]) -> Fleet {
        let vip = Config::default().vip;
        let mut builder = Builder::new(&vip, Vips::new((&vip).into()));
        builder.set_drains(drains);
        let record = |instances: &[Instance]| ServiceRecord::new(instances.into(), Watch::Live);
        let web = [instance("n1", "web-1", "10.0.0.1"), instance("n2", "web-2", "10.0.0.2")];
        // One endpoint that two nodes register.
        let db = [instance("n1", "db", "10.0.0.9"), instance("n3", "db", "10.0.0.9")];
        let catalog = [("web", record(&web)), ("db", record(&db))];
        let catalog = catalog.into_iter().chain(others);
        let catalog: Catalog =
            catalog.map(|(name, record)| (ServiceId::new(name), record)).collect();
        let table = builder.next(&Table::default(), &catalog, SystemTime::UNIX_EPOCH);
        let table = table.unwrap().table;
        Fleet { builder, catalog, table, obstacles: Obstacles::default() }
    }

    /// Applies a change, as the daemon does.
    fn change(
        &mut self,
        book: &mut DrainBook,
        change: Change,
        text: &str,
    ) -> Result<api::DrainChange, String> {
        let searched = self.builder.drain_catalog();
        let found = find(change, text, &book.drains(), searched, self.table.is_synced());
        let FoundTarget { target, covered, searched } = found.map_err(|error| error.to_string())?;
        let changed = book.change(change, target).unwrap();
        self.builder.change_drains(book.drains(), covered, &searched);
        let next = self.builder.next(&self.table, &self.catalog, SystemTime::UNIX_EPOCH);
        assert!(next.is_none() || changed.is_changed, "{text}");
        self.table = next.map_or(self.table.clone(), |next| next.table);
        Ok(result(change, &changed, &book.drains(), &self.table, &self.obstacles))
    }

    /// The backends that are drained.
    fn drained(&self) -> Vec<String> {
        let backends = self.table.services.values().flat_map(|service| &service.backends);
        let drained = backends.filter(|backend| backend.state == BackendState::Draining);
        drained.map(|backend| format!("{}/{}", backend.node, backend.id)).collect()
    }
}

async fn recorded(book: &DrainBook) {
    let version = book.version;
    let mut recorded = book.recorder.recorded();
    recorded.wait_for(|now| now.version >= version).await.unwrap();
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn what_is_drained_gets_nothing_and_what_is_unknown_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut book = DrainBook::open(dir.path()).await.unwrap();
    let mut fleet = Fleet::new(book.drains());
    let unknown = fleet.change(&mut book, Change::Drain, "n4").unwrap_err();
    let expected = "among 4 instances on 3 nodes; the closest names are `node:n1`, `node:n2`";
    assert!(unknown.contains(expected), "{unknown}");
    assert!(fleet.change(&mut book, Change::Undrain, "n4").is_err());
    assert!(fleet.change(&mut book, Change::Drain, "edge").is_err());
    assert_eq!(find_edge("edge", &book.drains(), false), None);
    assert_eq!((fleet.drained().len(), book.version), (0, 0));

    let drained = fleet.change(&mut book, Change::Drain, "web-1").unwrap();
    assert_eq!((drained.changed, drained.drained, drained.backends), (true, true, 1));
    assert_eq!((&drained.warnings[..], fleet.drained()), (&[][..], vec!["n1/web-1".into()]));
    let reason = fleet.table.services["web"].backends[0].reason.clone().unwrap();
    let since = drained.since.unwrap();
    assert_eq!(reason, format!("drained by hand since {since}, as instance:n1/web-1"));
    let again = fleet.change(&mut book, Change::Drain, "n1/web-1").unwrap();
    assert_eq!((again.changed, again.drained), (false, true));

    // A node, with the endpoint that another registers as well.
    let node = fleet.change(&mut book, Change::Drain, "n3").unwrap();
    let warning = "db has no backend left here: connections to it are refused";
    assert_eq!((node.services, &node.warnings[..]), (1, &[warning.to_owned()][..]));
    assert_eq!(fleet.drained(), ["n3/db", "n1/web-1"]);

    // What two drains cover stays drained.
    fleet.change(&mut book, Change::Drain, "10.0.0.1").unwrap();
    let undrained = fleet.change(&mut book, Change::Undrain, "web-1").unwrap();
    assert_eq!(undrained.problem, None);
    let warning = "10.0.0.1:80 of web is still drained, by address:10.0.0.1";
    assert_eq!((undrained.drained, &undrained.warnings[..]), (false, &[warning.into()][..]));
    // Nor does it help to undrain it by another name than that by which it was drained.
    let held = fleet.change(&mut book, Change::Undrain, "web-1").unwrap();
    let problem = "instance:n1/web-1 is drained by another drain, which `nohop undrain address:10.0.0.1` ends";
    assert_eq!((held.ok, held.problem.as_deref()), (false, Some(problem)));
    // A node of which an instance is drained on purpose isn't.
    let of_node = fleet.change(&mut book, Change::Undrain, "n1").unwrap();
    assert_eq!((of_node.ok, of_node.changed, of_node.warnings.len()), (true, false, 1));
    fleet.change(&mut book, Change::Undrain, "10.0.0.1").unwrap();
    assert_eq!(fleet.drained(), ["n3/db"]);
    let not_drained = fleet.change(&mut book, Change::Undrain, "web-1").unwrap();
    assert_eq!((not_drained.ok, not_drained.changed), (true, false));
}

#[tokio::test]
async fn a_node_of_cold_services_is_drained_before_they_are_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let mut book = DrainBook::open(dir.path()).await.unwrap();
    let cold = ServiceRecord::new([].into(), Watch::Cold);
    let mut fleet = Fleet::with(book.drains(), [("s1", cold.clone()), ("s2", cold)]);
    assert!(fleet.change(&mut book, Change::Drain, "n7").is_err());
    let drained = fleet.change(&mut book, Change::Drain, "node:n7").unwrap();
    assert_eq!((drained.changed, drained.drained, drained.backends), (true, true, 0));
    let warning = "it covers no instance that is known here; 2 services are cold, and what it covers of \
                   them is drained once it is fetched";
    assert_eq!(drained.warnings, [warning]);
    let fetched = ServiceRecord::new([instance("n7", "s1", "10.0.0.7")].into(), Watch::Live);
    let known = fleet.catalog.iter().map(|(id, record)| (id.clone(), record.clone()));
    fleet.catalog = known.chain([(ServiceId::new("s1"), fetched)]).collect();
    let next = fleet.builder.next(&fleet.table, &fleet.catalog, SystemTime::UNIX_EPOCH);
    fleet.table = next.unwrap().table;
    assert_eq!(fleet.drained(), ["n7/s1"]);
}

#[tokio::test]
async fn a_service_that_had_no_backend_is_no_loss_of_a_drain() {
    let dir = tempfile::tempdir().unwrap();
    let mut book = DrainBook::open(dir.path()).await.unwrap();
    let unweighted = Instance { weight: 0, ..instance("n5", "w0", "10.0.0.5") };
    let record = ServiceRecord::new([unweighted].into(), Watch::Live);
    let mut fleet = Fleet::with(book.drains(), [("w0", record)]);
    let drained = fleet.change(&mut book, Change::Drain, "n5").unwrap();
    assert_eq!((drained.backends, &drained.warnings[..]), (1, &[][..]));
}

#[tokio::test]
async fn drains_outlive_the_daemon_and_what_they_cover() {
    let dir = tempfile::tempdir().unwrap();
    let mut book = DrainBook::open(dir.path()).await.unwrap();
    let mut fleet = Fleet::new(book.drains());
    fleet.change(&mut book, Change::Drain, "n1").unwrap();
    fleet.change(&mut book, Change::Drain, "10.0.0.2:80").unwrap();
    recorded(&book).await;

    let mut next = DrainBook::open(dir.path()).await.unwrap();
    assert_eq!(next.drains(), book.drains());
    assert_eq!((next.version, next.view().problems().count()), (0, 0));
    let first = Fleet::new(next.drains());
    assert_eq!(first.drained(), ["n1/db", "n1/web-1", "n2/web-2"], "in the first table");

    // Before the first catalog nothing can be found but what is drained.
    let vip = Config::default().vip;
    let empty = Builder::new(&vip, Vips::new((&vip).into())).drain_catalog();
    let drains = next.drains();
    let found = |change, text, is_synced| find(change, text, &drains, empty.clone(), is_synced);
    for change in [Change::Drain, Change::Undrain] {
        let early = found(change, "n2", false).unwrap_err();
        assert!(matches!(early, DrainError::NotSynced(_)), "{early}");
    }
    let n1 = found(Change::Drain, "n1", false).unwrap().target;
    assert!(!next.change(Change::Drain, n1).unwrap().is_changed);
    let n1 = found(Change::Undrain, "n1", true).unwrap().target;
    assert!(next.change(Change::Undrain, n1).unwrap().is_changed);
    recorded(&next).await;
    assert_eq!(DrainBook::open(dir.path()).await.unwrap().drains().len(), 1);
}

#[tokio::test]
async fn a_drained_edge_is_drained_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut book = DrainBook::open(dir.path()).await.unwrap();
    let edge = find_edge("edge", &book.drains(), true).unwrap();
    let changed = book.change(Change::Drain, edge).unwrap();
    let fleet = Fleet::new(book.drains());
    assert!(fleet.drained().is_empty(), "no backend is");
    let drains = book.drains();
    let result = result(Change::Drain, &changed, &drains, &fleet.table, &fleet.obstacles);
    assert_eq!((result.kind.as_deref(), result.drained), (Some("edge"), true));
    recorded(&book).await;
    // A version that knows no edge reads the file, but for that.
    let text = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
    assert!(text.contains("\"drains\":[],\"edge\":{\"since\":"), "{text}");
    let mut next = DrainBook::open(dir.path()).await.unwrap();
    // Also where it is no edge any more.
    let edge = find_edge("edge", &next.drains(), false).unwrap();
    assert!(next.change(Change::Undrain, edge).unwrap().is_changed);
    assert!(next.drains().is_empty());
}

#[tokio::test]
async fn times_of_another_boot_begin_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let text = br#"{"version":1,"boot":"another","drains":[
        {"target":{"node":"n1"},"since":1795948200,"boottime_ms":18446744073709551615}]}"#;
    std::fs::write(&path, text).unwrap();
    let before = boottime_ms();
    let book = DrainBook::open(dir.path()).await.unwrap();
    let drains = book.drains();
    let (target, drain) = drains.iter().next().unwrap();
    assert_eq!((target.to_string(), drain.since), ("node:n1".into(), 1_795_948_200));
    assert!((before..=boottime_ms()).contains(&drain.boottime_ms), "{drain:?}");
    recorded(&book).await;
    let written = std::fs::read_to_string(&path).unwrap();
    assert!(written.contains(&boot::id().unwrap()), "{written}");
}

#[tokio::test]
async fn a_file_that_is_not_understood_is_set_aside_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    for (text, problem) in [
        ("{\"version\":1,", "it isn't understood: EOF"),
        ("", "it isn't understood: EOF"),
        ("{\"version\":1,\"boot\":\"b\",\"drains\":[{\"target\":{\"rack\":\"r\"}}]}", "`rack`"),
        ("{\"version\":2,\"racks\":[]}", "it is of version 2, and this is version 1"),
    ] {
        std::fs::write(&path, text).unwrap();
        let book = DrainBook::open(dir.path()).await.unwrap();
        let problems: Vec<_> = book.view().problems().collect();
        assert!(problems.len() == 1 && problems[0].contains(problem), "{problems:?}");
        assert!(book.drains().is_empty() && !path.exists());
    }
    let aside: Vec<_> = (1..=4).map(|nth| format!("drains.unread-{nth}")).collect();
    assert_eq!(names(dir.path()), aside);
    let last = std::fs::read_to_string(dir.path().join("drains.unread-4")).unwrap();
    assert_eq!(last, "{\"version\":2,\"racks\":[]}");
}

#[tokio::test]
async fn a_change_that_the_disk_does_not_take_applies_and_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().join("state");
    let mut book = DrainBook::open(&state_dir).await.unwrap();
    // A file in the directory's place.
    std::fs::write(&state_dir, "").unwrap();
    let mut fleet = Fleet::new(book.drains());
    // Also what is drained already isn't on disk.
    for is_changed in [true, false] {
        let result = fleet.change(&mut book, Change::Drain, "n1").unwrap();
        let answered = answer(&book, result).await;
        assert!(answered.ok && answered.changed == is_changed);
        assert_eq!(answered.warnings.len(), 2, "{answered:?}");
        assert!(answered.warnings[1].contains("a restart loses what"), "{answered:?}");
    }
}

async fn answer(book: &DrainBook, result: api::DrainChange) -> api::DrainChange {
    let (answer, answered) = oneshot::channel();
    book.answer(move || result, answer);
    answered.await.unwrap()
}

#[tokio::test]
async fn a_stop_waits_for_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut book = DrainBook::open(dir.path()).await.unwrap();
    let mut fleet = Fleet::new(book.drains());
    book.flush().await.unwrap();
    fleet.change(&mut book, Change::Drain, "n1").unwrap();
    book.flush().await.unwrap();
    let written = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
    assert!(written.contains("{\"node\":\"n1\"}"), "{written}");
}

/// Nothing is lost: neither what the file has, nor what was changed before it was read.
#[tokio::test]
async fn a_file_that_is_read_late_applies_then_and_is_not_overwritten_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    // It isn't read before another is in its place.
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let mut book = DrainBook::open_within(dir.path(), Duration::ZERO).await.unwrap();
    assert!(book.drains().is_incomplete());
    let view = book.view();
    let is_named = |it: &Option<String>| it.as_ref().is_some_and(|it| it.contains("it is a FIFO"));
    book.problem.subscribe().wait_for(is_named).await.unwrap();
    let problem = view.problems().collect::<Vec<_>>().join("\n");
    assert!(problem.contains("drains.json isn't read yet (it is a FIFO"), "{problem}");
    book.flush().await.unwrap();

    let mut fleet = Fleet::new(book.drains());
    let drained = fleet.change(&mut book, Change::Drain, "n1").unwrap();
    let drained = answer(&book, drained).await;
    assert_eq!((drained.changed, &drained.warnings[1..]), (true, &[problem.clone()][..]));
    let undrained = fleet.change(&mut book, Change::Undrain, "n3").unwrap();
    assert_eq!((undrained.changed, undrained.drained), (false, false));
    assert_eq!(answer(&book, undrained).await.warnings, [problem]);
    // It may be drained in the file, by a name that the catalog doesn't have.
    assert_eq!(answer(&book, refuse("unknown")).await.warnings.len(), 1);
    assert!(book.flush().await.is_err());
    assert!(!path.is_file(), "it is overwritten");

    let entry = |node: &str, at: u64| {
        let target = DrainTarget::Node(node.into());
        Entry { target, drain: Drain { since: 7, boottime_ms: at } }
    };
    let drains = vec![entry("n1", 1), entry("n2", 2), entry("n3", 3)];
    let file = File { version: VERSION, boot: book.boot.clone(), drains, edge: None };
    let text = serde_json::to_vec(&file).unwrap();
    let new = dir.path().join("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(&new, &path).unwrap();
    let read = book.read().await;
    book.adopt(read);
    let now = book.drains();
    let shown: Vec<_> =
        now.iter().map(|(target, drain)| (target.name(), drain.boottime_ms)).collect();
    assert_eq!(shown, [("n1".into(), 1), ("n2".into(), 2)]);
    assert!(!now.is_incomplete());
    assert_eq!(view.problems().count(), 0);
    book.flush().await.unwrap();
    assert_eq!(DrainBook::open(dir.path()).await.unwrap().drains(), now);
}

#[tokio::test]
async fn a_file_that_cannot_be_read_stays_until_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    std::fs::create_dir(&path).unwrap();
    let mut book = DrainBook::open_within(dir.path(), Duration::ZERO).await.unwrap();
    // The thread reports the reason.
    let mut problem = book.problem.subscribe();
    let has = |why| move |it: &Option<String>| it.as_ref().is_some_and(|it| it.contains(why));
    problem.wait_for(has("drains.json isn't read yet (it is a directory")).await.unwrap();
    std::fs::remove_dir(&path).unwrap();
    let read = book.read().await;
    book.adopt(read);
    assert_eq!(book.view().problems().count(), 0);
}

#[tokio::test]
async fn a_change_without_effect_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let mut book = DrainBook::open(dir.path()).await.unwrap();
    let mut fleet = Fleet::new(book.drains());
    let errors = [("web".into(), "a map is full".into()), ("api".into(), "x".into())];
    fleet.obstacles =
        Obstacles { general: vec!["it has no effect yet".into()], errors: errors.into() };
    let result = fleet.change(&mut book, Change::Drain, "n2").unwrap();
    let expected = ["it has no effect yet", "web keeps its former backends for now: a map is full"];
    assert_eq!(result.warnings, expected);
}

/// The catalog may change while what is drained is searched for.
#[tokio::test]
async fn what_registers_during_the_search_is_drained() {
    let dir = tempfile::tempdir().unwrap();
    let mut book = DrainBook::open(dir.path()).await.unwrap();
    let mut fleet = Fleet::new(book.drains());
    let searched = fleet.builder.drain_catalog();
    let found = find(Change::Drain, "n2", &book.drains(), searched, true).unwrap();
    let late = [instance("n2", "late", "10.0.0.3")];
    let record = ServiceRecord::new(late.into(), Watch::Live);
    fleet.catalog.insert(ServiceId::new("late"), record);
    let next = fleet.builder.next(&fleet.table, &fleet.catalog, SystemTime::UNIX_EPOCH);
    fleet.table = next.unwrap().table;
    book.change(Change::Drain, found.target).unwrap();
    fleet.builder.change_drains(book.drains(), found.covered, &found.searched);
    let next = fleet.builder.next(&fleet.table, &fleet.catalog, SystemTime::UNIX_EPOCH);
    let next = next.unwrap().table;
    // No other service is built.
    assert!(Arc::ptr_eq(&next.services["db"], &fleet.table.services["db"]));
    fleet.table = next;
    assert_eq!(fleet.drained(), ["n2/late", "n2/web-2"]);
}
