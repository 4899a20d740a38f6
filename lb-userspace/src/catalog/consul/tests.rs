//! The whole source, against a Consul that fails in every known way.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::test_server::{AGENT, Fake, Fault, NAMES, instance, service};
use super::*;
use crate::catalog::file::follow::FileWatcher;
use crate::catalog::{Catalog, Handle, Lookup};
use crate::config::{CatalogConfig, Config, ConsulAddress, ConsulConfig, WatchPolicy};
use crate::table::{HealthStatus, ServiceMeta, Watch};

const LIMIT: Duration = Duration::from_secs(60);

fn timing() -> Timing {
    Timing {
        connect: Duration::from_secs(2),
        answer: Duration::from_millis(300),
        wait: Duration::from_secs(60),
        first_wait: Duration::from_secs(60),
        turn: Duration::from_millis(50),
        names: Duration::ZERO,
        switch: Duration::from_millis(10),
        confirm: Duration::from_millis(10),
        distrust: Duration::ZERO,
        withheld: Duration::from_millis(20),
        linger: Duration::ZERO,
        agent: Duration::from_millis(10),
        token: Duration::from_millis(10),
        patience: Duration::from_secs(2),
        stragglers: Duration::from_millis(200),
        in_use: LIMIT,
        save: Duration::from_millis(50),
    }
}

fn config(address: impl ToString) -> ConsulConfig {
    ConsulConfig {
        address: ConsulAddress::Http(address.to_string()),
        max_connections: 8,
        ..ConsulConfig::default()
    }
}

fn follow(config: ConsulConfig, timing: Timing) -> Handle {
    follow_as(settings(config, WatchPolicy::All, timing))
}

fn settings(consul: ConsulConfig, watch: WatchPolicy, timing: Timing) -> Settings {
    let catalog = Arc::new(CatalogConfig { watch, ..Config::default().catalog });
    Settings { consul, catalog, in_use: Vec::new(), cache: None, timing }
}

fn follow_as(settings: Settings) -> Handle {
    let mut handle = Handle::of(Publisher::new("consul"));
    follow_in(&mut handle, settings);
    handle
}

/// Puts another source in the place of the handle's.
fn follow_in(handle: &mut Handle, settings: Settings) {
    let source = Arc::new(move |output, wishes| {
        Box::pin(run(settings.clone(), output, wishes)) as Pin<Box<dyn Future<Output = ()>>>
    });
    handle.run_source(source, None);
}

async fn shows(handle: &mut Handle, is_it: impl Fn(&Catalog) -> bool) -> Catalog {
    let seen =
        handle.catalog.wait_for(|published| published.as_ref().is_some_and(|e| is_it(&e.catalog)));
    let seen = tokio::time::timeout(LIMIT, seen).await.expect("the catalog").unwrap();
    seen.clone().unwrap().catalog
}

async fn says(handle: &mut Handle, what: Option<&str>) {
    let mut last = None;
    let seen = handle.health.wait_for(|health| {
        last.clone_from(&health.problem);
        match (&health.problem, what) {
            (None, None) => health.last_answer.is_some(),
            (Some(problem), Some(what)) => problem.contains(what),
            _ => false,
        }
    });
    let seen = tokio::time::timeout(LIMIT, seen).await.is_ok();
    assert!(seen, "expected {what:?}, last was {last:?}");
}

fn names(catalog: &Catalog) -> Vec<&str> {
    catalog.keys().map(|id| &*id.name).collect()
}

fn ports(catalog: &Catalog, name: &str) -> Vec<i64> {
    catalog[name].groups[0].instances.iter().map(|instance| instance.port).collect()
}

/// A Consul with `web`, of one instance, and a source that has synced with it.
async fn synced() -> (Fake, Handle, Catalog) {
    let fake = Fake::start().await;
    fake.set_names(10, &["web"]);
    fake.set(&service("web"), 20, json!([instance("n1", "web-1", 1)]));
    let mut handle = follow(config(fake.address), timing());
    let catalog = shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
    assert_eq!(ports(&catalog, "web"), [1]);
    assert!(catalog["web"].groups[0].instances[0].local);
    says(&mut handle, None).await;
    (fake, handle, catalog)
}

#[tokio::test]
async fn follows_names_and_instances() {
    let (fake, mut handle, first) = synced().await;
    fake.set(&service("db"), 30, json!([instance("n2", "db-1", 5432)]));
    fake.set_names(11, &["db", "web"]);
    let second = shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    assert!(Arc::ptr_eq(&first["web"].groups[0].instances, &second["web"].groups[0].instances));
    assert!(!second["db"].groups[0].instances[0].local);

    let mut critical = instance("n1", "web-1", 1);
    critical["Checks"][0]["Status"] = json!("critical");
    fake.set(&service("web"), 31, json!([critical]));
    let is_out = |catalog: &Catalog| {
        catalog["web"].groups[0].instances[0].health
            == HealthStatus::Out("check `web` is critical".into())
    };
    shows(&mut handle, is_out).await;

    fake.set_names(12, &["db"]);
    shows(&mut handle, |catalog| names(catalog) == ["db"]).await;
}

#[tokio::test]
async fn only_declarations_for_nohop_publish_a_change() {
    let (fake, mut handle, _) = synced().await;
    let with_meta = |meta| {
        let mut web = instance("n1", "web-1", 1);
        web["Service"]["Meta"] = meta;
        json!([web])
    };
    handle.catalog.mark_unchanged();
    fake.set(&service("web"), 21, with_meta(json!({"version": "3"})));
    let mut meta = json!({"version": "4", "nohop-ports": "80,5432", "nohop-protocol": "both"});
    meta["nohop-algorithm"] = "maglev".into();
    meta["nohop-weight"] = "7".into();
    meta["nohop-public"] = "203.0.113.10:443".into();
    fake.set(&service("web"), 22, with_meta(meta));
    let expected = ServiceMeta {
        ports: Some("80,5432".into()),
        protocol: Some("both".into()),
        algorithm: Some("maglev".into()),
        weight: Some("7".into()),
        public: Some("203.0.113.10:443".into()),
        problems: Vec::new(),
    };
    shows(&mut handle, |catalog| catalog["web"].groups[0].instances[0].meta == expected).await;
    fake.set(&service("web"), 23, with_meta(json!(null)));
    shows(&mut handle, |catalog| {
        catalog["web"].groups[0].instances[0].meta == ServiceMeta::default()
    })
    .await;
    // A tag alone changes as well.
    for (index, weight) in [(24, "7"), (25, "8")] {
        let mut web = instance("n1", "web-1", 1);
        let tags = web["Service"]["Tags"].as_array_mut().unwrap();
        tags.push(format!("nohop.weight={weight}").into());
        fake.set(&service("web"), index, json!([web]));
        shows(&mut handle, |catalog| {
            catalog["web"].groups[0].instances[0].meta.weight.as_deref() == Some(weight)
        })
        .await;
    }
}

#[tokio::test]
async fn a_new_output_of_a_check_publishes_nothing() {
    let (fake, mut handle, _) = synced().await;
    handle.catalog.mark_unchanged();
    let mut talkative = instance("n1", "web-1", 1);
    talkative["Checks"][0]["Publisher"] = json!("still fine");
    fake.set(&service("web"), 21, json!([talkative]));
    // A request after index 21 is sent once 21 was applied.
    let asked = format!("{}?index=21&wait=60000ms", service("web"));
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    assert!(!handle.catalog.has_changed().unwrap());
}

#[tokio::test]
async fn no_failure_removes_anything_and_each_is_reported_until_it_ends() {
    let faults = [
        (Fault::Status(403, "ACL not found"), "403, `ACL not found`"),
        (Fault::Status(500, "No cluster leader\nmore"), "`No cluster leader`"),
        (Fault::Status(429, "too many"), "busy (429"),
        (Fault::Status(503, ""), "busy (503"),
        (Fault::Cut, "cut short"),
        (Fault::Body("{}x"), "another shape"),
        (Fault::Body("17"), "another shape"),
        (Fault::Body("\n<!DOCTYPE html><title>nginx</title>"), "isn't Consul's agent"),
        (Fault::Status(504, "<html>"), "a proxy before Consul gets no answer from it (504"),
        (Fault::Close, "lost"),
    ];
    let (fake, mut handle, first) = synced().await;
    let mut index = 100;
    for (fault, what) in faults {
        for path in [NAMES.into(), service("web")] {
            // A blocking query ends with the fault.
            fake.break_path(&path, Some(fault.clone()));
            says(&mut handle, Some(what)).await;
            let now = handle.catalog.borrow().clone().unwrap();
            assert!(
                Arc::ptr_eq(
                    &now.catalog["web"].groups[0].instances,
                    &first["web"].groups[0].instances
                ),
                "{fault:?} on {path}"
            );
            fake.break_path(&path, None);
            says(&mut handle, None).await;
        }
        // Both watches still follow.
        index += 1;
        fake.set(&service("new"), index, json!([]));
        fake.set_names(index, &["new", "web"]);
        shows(&mut handle, |catalog| names(catalog) == ["new", "web"]).await;
        fake.set_names(index + 1, &["web"]);
        shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
        index += 1;
    }
}

#[tokio::test]
async fn a_request_without_a_response_times_out_and_is_repeated() {
    let fake = Fake::start().await;
    fake.set_names(10, &["web"]);
    fake.set(&service("web"), 20, json!([instance("n1", "web-1", 1)]));
    let wait = Duration::from_millis(400);
    let mut handle = follow(config(fake.address), Timing { wait, ..timing() });
    shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
    for path in [NAMES.into(), service("web")] {
        fake.break_path(&path, Some(Fault::Hang));
        says(&mut handle, Some("no answer within 600ms")).await;
        assert_eq!(handle.catalog.borrow().as_ref().unwrap().catalog.len(), 1);
        fake.break_path(&path, None);
        says(&mut handle, None).await;
    }
    fake.set(&service("web"), 21, json!([instance("n1", "web-1", 2)]));
    shows(&mut handle, |catalog| ports(catalog, "web") == [2]).await;
}

#[tokio::test]
async fn a_wrong_type_is_reported_with_its_service_and_path() {
    let (fake, mut handle, _) = synced().await;
    let wrong = Fault::Body(r#"[{"Service":{"Tags":["routed"],"Port":"80"}}]"#);
    fake.break_path(&service("web"), Some(wrong));
    says(&mut handle, Some("service `web`: ")).await;
    says(&mut handle, Some("[0].Service.Port")).await;
    // Another one is followed meanwhile.
    fake.set(&service("db"), 30, json!([instance("n2", "db-1", 5432)]));
    fake.set_names(11, &["db", "web"]);
    let catalog = shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    assert_eq!(ports(&catalog, "web"), [1]);
}

#[tokio::test]
async fn an_index_that_goes_backwards_is_confirmed() {
    let (fake, mut handle, _) = synced().await;
    let asked = format!("{}?consistent", service("web"));
    assert_eq!(fake.n_asked(&asked), 0);
    fake.set(&service("web"), 5, json!([instance("n1", "web-1", 2)]));
    let catalog = shows(&mut handle, |catalog| ports(catalog, "web") != [1]).await;
    assert_eq!(ports(&catalog, "web"), [2]);
    assert_eq!(fake.n_asked(&asked), 1);
}

#[tokio::test]
async fn starts_before_consul_does() {
    // A port without a listener, for now.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut handle = follow(config(free), timing());
    says(&mut handle, Some("can't reach Consul at 127.0.0.1")).await;
    assert!(handle.catalog.borrow().is_none());
    assert!(handle.health.borrow().last_answer.is_none());
}

#[tokio::test]
async fn a_service_without_a_response_delays_no_other() {
    let fake = Fake::start().await;
    fake.set_names(10, &["bad", "web"]);
    fake.set(&service("web"), 20, json!([instance("n1", "web-1", 1)]));
    fake.break_path(&service("bad"), Some(Fault::Hang));
    let mut handle = follow(config(fake.address), timing());
    shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
    says(&mut handle, Some("service `bad`: ")).await;
    fake.break_path(&service("bad"), None);
    shows(&mut handle, |catalog| names(catalog) == ["bad", "web"]).await;
    says(&mut handle, None).await;
}

#[tokio::test]
async fn a_token_without_agent_read_makes_no_instance_local() {
    let fake = Fake::start().await;
    fake.break_path(AGENT, Some(Fault::Status(403, "Permission denied")));
    fake.set_names(10, &["web"]);
    let mut loopback = instance("n1", "web-1", 1);
    loopback["Service"]["Address"] = json!("127.0.0.1");
    fake.set(&service("web"), 20, json!([loopback]));
    let mut handle = follow(config(fake.address), timing());
    let catalog = shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
    assert!(!catalog["web"].groups[0].instances[0].local);
    says(&mut handle, Some("agent:read")).await;
}

#[tokio::test]
async fn watches_take_turns_where_connections_are_few() {
    let fake = Fake::start().await;
    let services: Vec<String> = (0..6).map(|n| format!("s{n}")).collect();
    let all: Vec<&str> = services.iter().map(String::as_str).collect();
    for name in &all {
        fake.set(&service(name), 20, json!([instance("n1", "1", 1)]));
    }
    fake.set_names(10, &all[..1]);
    let config = ConsulConfig { max_connections: 5, ..config(fake.address) };
    let mut handle = follow(config, timing());
    shows(&mut handle, |catalog| names(catalog) == all[..1]).await;
    says(&mut handle, None).await;

    // The first, which may wait for a minute, has to let go.
    fake.set_names(11, &all);
    shows(&mut handle, |catalog| names(catalog) == all).await;
    says(&mut handle, Some("6 services share 2 connections")).await;
    for name in &all {
        fake.set(&service(name), 21, json!([instance("n1", "1", 2)]));
        shows(&mut handle, |catalog| ports(catalog, name) == [2]).await;
    }
    let most = fake.state.borrow().most_connections;
    assert!(most <= 5, "{most} connections, {fake:?}");

    for name in &all[2..] {
        fake.set(&service(name), 22, json!([]));
    }
    fake.set_names(12, &all[..2]);
    shows(&mut handle, |catalog| names(catalog) == all[..2]).await;
    says(&mut handle, None).await;
}

#[tokio::test]
async fn the_token_file_is_read_for_each_request() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    let fake = Fake::start().await;
    let token = Some(crate::config::Token::File(path.clone()));
    let mut handle = follow(ConsulConfig { token, ..config(fake.address) }, timing());
    says(&mut handle, Some("can't read the Consul token")).await;
    std::fs::write(&path, "").unwrap();
    says(&mut handle, Some("token is empty")).await;
    std::fs::write(&path, "secret\n").unwrap();
    shows(&mut handle, Catalog::is_empty).await;
    says(&mut handle, None).await;
}

#[tokio::test]
async fn a_dropped_handle_leaves_no_connection() {
    let (fake, handle, _) = synced().await;
    drop(handle);
    let mut state = fake.state.subscribe();
    let gone = state.wait_for(|state| state.n_connections == 0);
    tokio::time::timeout(LIMIT, gone).await.expect("closed").unwrap();
}

/// `web` and `db`, and a source that follows what is used, which is nothing yet.
async fn cold() -> (Fake, Handle) {
    let fake = Fake::start().await;
    for (name, port) in [("db", 5432), ("web", 80)] {
        fake.set(&service(name), 20, json!([instance("n1", "1", port)]));
    }
    fake.set_names(10, &["db", "web"]);
    let handle = follow_as(settings(config(fake.address), WatchPolicy::Used, timing()));
    (fake, handle)
}

/// The number of requests about a service.
fn n_requests_about(fake: &Fake, name: &str) -> usize {
    let state = fake.state.borrow();
    let about = state.asked.iter().filter(|(question, _)| question.starts_with(&service(name)));
    about.map(|(_, n)| n).sum()
}

#[tokio::test]
async fn an_unused_service_is_cold_and_not_requested() {
    let (fake, mut handle) = cold().await;
    let first = shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    assert!(first.values().all(|listing| listing.watch == Watch::Cold));
    assert!(first.values().all(|listing| listing.groups[0].instances.is_empty()));

    assert_eq!(handle.demand.look_up("web").await, Lookup::Exists);
    // By then it is published.
    let second = handle.catalog.borrow().clone().unwrap().catalog;
    assert_eq!((second["web"].watch, ports(&second, "web")), (Watch::Live, vec![80]));
    assert_eq!(second["db"].watch, Watch::Cold);
    assert_eq!(n_requests_about(&fake, "db"), 0);
    let watches = handle.stats.watches();
    assert_eq!((watches.live, watches.cold), (1, 1));
}

#[tokio::test]
async fn an_unlisted_name_is_looked_up_and_a_flood_of_them_is_not() {
    let (fake, mut handle) = cold().await;
    shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    fake.set(&service("new"), 30, json!([instance("n1", "1", 90)]));
    assert_eq!(handle.demand.look_up("new").await, Lookup::Exists);
    let catalog = handle.catalog.borrow().clone().unwrap().catalog;
    assert_eq!((names(&catalog), ports(&catalog, "new")), (vec!["db", "new", "web"], vec![90]));
    // The list learns of it, and then that it is gone.
    fake.set_names(11, &["db", "new", "web"]);
    let asked = format!("{NAMES}?index=11&wait=60000ms");
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    fake.set_names(12, &["db", "web"]);
    fake.set(&service("new"), 31, json!([]));
    shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;

    for n in 0..200 {
        let expected = if n < 9 { Lookup::Absent } else { Lookup::Unknown };
        let got = handle.demand.look_up(&format!("made-up-{n}")).await;
        // Five more a second are looked up beyond the first ten, of which `new` was one.
        assert!(got == expected || got == Lookup::Absent, "{n}: {got:?}");
    }
    let n_asked: usize = (0..200).map(|n| n_requests_about(&fake, &format!("made-up-{n}"))).sum();
    assert!(n_asked < 50, "{n_asked} questions");
}

#[tokio::test]
async fn a_new_name_with_upper_case_is_one_service_before_the_list_has_it_and_after() {
    let (fake, mut handle) = cold().await;
    shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    // Consul finds it by either name, and DNS asks in lower case.
    let mut new = instance("n1", "1", 90);
    new["Service"]["Service"] = json!("New");
    for path in [service("new"), service("New")] {
        fake.set(&path, 30, json!([new]));
    }
    assert_eq!(handle.demand.look_up("new").await, Lookup::Exists);
    let catalog = handle.catalog.borrow().clone().unwrap().catalog;
    assert_eq!((names(&catalog), ports(&catalog, "New")), (vec!["New", "db", "web"], vec![90]));
    assert_eq!(handle.demand.look_up("new").await, Lookup::Exists);
    fake.set_names(11, &["New", "db", "web"]);
    let asked = format!("{NAMES}?index=11&wait=60000ms");
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    assert_eq!(catalog, handle.catalog.borrow().clone().unwrap().catalog);
}

#[tokio::test]
async fn an_unknown_name_is_answered_at_once_while_consul_is_down() {
    let (fake, mut handle, _) = synced().await;
    // The problem of the names, which alone shows that Consul is down, reads as that of the others.
    fake.break_path(NAMES, Some(Fault::Close));
    says(&mut handle, Some("lost")).await;
    for path in [kill_switch::PATH, AGENT] {
        fake.break_path(path, Some(Fault::Close));
    }
    // A request would take until its timeout.
    fake.break_path(&service("made-up"), Some(Fault::Hang));
    for _ in 0..100 {
        assert_eq!(handle.demand.look_up("made-up").await, Lookup::Unknown);
    }
    assert_eq!(n_requests_about(&fake, "made-up"), 0);
}

#[tokio::test]
async fn a_name_is_absent_only_by_an_answer_of_consul() {
    let (fake, mut handle) = cold().await;
    shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    // Neither is in the list; `new` could be registered a moment ago.
    assert_eq!(handle.demand.look_up("absent").await, Lookup::Absent);
    for fault in [
        Fault::Status(500, "rpc error making call: EOF"),
        Fault::Status(429, "too many"),
        Fault::Status(403, "Permission denied"),
        Fault::Close,
        Fault::Cut,
        Fault::Hang,
        Fault::Header("X-Consul-Knownleader: false"),
        Fault::Header("X-Consul-Results-Filtered-By-ACLs: true"),
    ] {
        // One of another name, so that what is remembered of absent ones has no part in it.
        let name =
            format!("new-{fault:?}").to_lowercase().replace(|c: char| !c.is_alphabetic(), "");
        fake.break_path(&service(&name), Some(fault));
        assert_eq!(handle.demand.look_up(&name).await, Lookup::Unknown, "{name}");
    }
    // A name of the list whose instances can't be read.
    fake.break_path(&service("web"), Some(Fault::Status(500, "rpc error making call: EOF")));
    assert_eq!(handle.demand.look_up("web").await, Lookup::Unknown);
}

#[tokio::test]
async fn a_listed_name_that_has_never_been_read_is_unknown() {
    let fake = Fake::start().await;
    fake.set_names(10, &["new", "web"]);
    fake.set(&service("web"), 20, json!([instance("n1", "web-1", 1)]));
    fake.break_path(&service("new"), Some(Fault::Status(500, "rpc error making call: EOF")));
    let mut handle = follow(config(fake.address), timing());
    shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
    assert_eq!(handle.demand.look_up("new").await, Lookup::Unknown);
}

#[tokio::test]
async fn a_name_without_the_tag_goes_with_its_own_answer() {
    let (fake, mut handle, _) = synced().await;
    let mut untagged = instance("n1", "web-1", 1);
    untagged["Service"]["Tags"] = json!(["other"]);
    fake.set(&service("web"), 21, json!([untagged]));
    shows(&mut handle, Catalog::is_empty).await;
}

#[tokio::test]
async fn a_large_loss_is_confirmed_before_it_applies() {
    let (fake, mut handle, _) = synced().await;
    let all: Vec<_> = (1..=4).map(|n| instance("n1", &format!("web-{n}"), n)).collect();
    fake.set(&service("web"), 21, json!(all));
    shows(&mut handle, |catalog| ports(catalog, "web") == [1, 2, 3, 4]).await;
    let asked = format!("{}?consistent", service("web"));

    fake.set(&service("web"), 22, json!(all[..2]));
    shows(&mut handle, |catalog| ports(catalog, "web") == [1, 2]).await;
    assert_eq!((fake.n_asked(&asked), handle.stats.shrinks_held()), (0, 0), "half isn't more");

    fake.set(&service("web"), 23, json!([]));
    shows(&mut handle, |catalog| catalog["web"].groups[0].instances.is_empty()).await;
    assert_eq!((fake.n_asked(&asked), handle.stats.shrinks_held()), (1, 1));

    fake.set_names(11, &[]);
    shows(&mut handle, Catalog::is_empty).await;
    assert_eq!(fake.n_asked(&format!("{NAMES}?consistent")), 1);
    assert_eq!(handle.stats.shrinks_held(), 2);
}

#[tokio::test]
async fn the_kill_switch_is_followed_and_keeps_its_state_through_errors() {
    let (fake, mut handle, _) = synced().await;
    assert!(!*handle.off.borrow());
    fake.set(kill_switch::PATH, 40, json!([{"Value": null}]));
    handle.off.wait_for(|off| *off).await.unwrap();
    fake.break_path(kill_switch::PATH, Some(Fault::Status(500, "no leader")));
    says(&mut handle, Some("no leader")).await;
    assert!(*handle.off.borrow());
    fake.break_path(kill_switch::PATH, Some(Fault::Status(404, "")));
    handle.off.wait_for(|off| !*off).await.unwrap();
    let asked = format!("{}?consistent", kill_switch::PATH);
    assert_eq!(fake.n_asked(&asked), 2, "that it is on again is confirmed, as it was at the start");
    says(&mut handle, None).await;
    fake.break_path(kill_switch::PATH, Some(Fault::Status(403, "Permission denied")));
    let denied = handle.health.wait_for(|health| !health.facts.is_empty());
    let denied = tokio::time::timeout(LIMIT, denied).await.expect("a fact").unwrap().clone();
    assert!(denied.facts[0].contains("key:read") && denied.problem.is_none(), "{denied:?}");
}

#[tokio::test]
async fn one_stale_answer_does_not_switch_translation_on() {
    let (fake, mut handle, _) = synced().await;
    fake.set(kill_switch::PATH, 40, json!([{"Value": null}]));
    handle.off.wait_for(|off| *off).await.unwrap();
    let asked = format!("{}?consistent", kill_switch::PATH);
    // A stale server lacks the key, with an older index or a newer one.
    for (n, index) in [(2, 30), (3, 50)] {
        fake.set(kill_switch::PATH, index, json!([{"Value": null}]));
        fake.break_question(&asked, Some(Fault::Hang));
        fake.break_path(kill_switch::PATH, Some(Fault::Body("null")));
        let is_asked = |state: &super::test_server::State| state.asked.get(&asked) >= Some(&n);
        fake.state.subscribe().wait_for(is_asked).await.unwrap();
        assert!(*handle.off.borrow());
        fake.break_path(kill_switch::PATH, None);
        fake.break_question(&asked, None);
    }
    assert!(*handle.off.borrow());
}

#[tokio::test]
async fn nothing_is_published_before_the_kill_switch_was_read() {
    let fake = Fake::start().await;
    fake.set(kill_switch::PATH, 40, json!([{"Value": null}]));
    fake.break_path(kill_switch::PATH, Some(Fault::Status(500, "no leader")));
    fake.set_names(10, &["web"]);
    fake.set(&service("web"), 20, json!([instance("n1", "web-1", 1)]));
    let timing = Timing { stragglers: LIMIT, ..timing() };
    let mut handle = follow(config(fake.address), timing);
    says(&mut handle, Some("no leader")).await;
    let asked = format!("{}?index=20&wait=60000ms", service("web"));
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    assert!(handle.catalog.borrow().is_none());
    fake.break_path(kill_switch::PATH, None);
    shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
    assert!(*handle.off.borrow(), "by then it is known");
}

#[tokio::test]
async fn the_kill_switch_of_another_consul_does_not_apply_without_permission_to_read_it() {
    let (fake, mut handle, _) = synced().await;
    fake.set(kill_switch::PATH, 40, json!([{"Value": null}]));
    handle.off.wait_for(|off| *off).await.unwrap();
    let other = Fake::start().await;
    other.break_path(kill_switch::PATH, Some(Fault::Status(403, "Permission denied")));
    follow_in(&mut handle, settings(config(other.address), WatchPolicy::All, timing()));
    let off = tokio::time::timeout(LIMIT, handle.off.wait_for(|off| !*off)).await;
    off.expect("translation").unwrap();
}

#[tokio::test]
async fn a_failing_kill_switch_blocks_no_cold_service() {
    let (fake, mut handle) = cold().await;
    shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    fake.break_path(kill_switch::PATH, Some(Fault::Status(500, "no leader")));
    says(&mut handle, Some("no leader")).await;
    assert_eq!(handle.demand.look_up("web").await, Lookup::Exists);
}

#[tokio::test]
async fn an_agent_that_only_knows_itself_is_no_answer() {
    let fake = Fake::start().await;
    for path in [NAMES, kill_switch::PATH] {
        fake.break_path(path, Some(Fault::Status(500, "no leader")));
    }
    let mut handle = follow(config(fake.address), timing());
    says(&mut handle, Some("no leader")).await;
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(AGENT)).await.unwrap();
    assert!(handle.stats.requests().get("200").is_none_or(|n| *n <= 1));
    assert!(handle.health.borrow().last_answer.is_none());
}

#[tokio::test]
async fn a_list_without_a_service_that_serves_is_confirmed() {
    let fake = Fake::start().await;
    let all: Vec<String> = (0..10).map(|n| format!("s{n}")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    for name in &all {
        fake.set(&service(name), 20, json!([instance("n1", "1", 1)]));
    }
    fake.set_names(10, &all);
    let mut handle = follow(ConsulConfig { max_connections: 64, ..config(fake.address) }, timing());
    shows(&mut handle, |catalog| names(catalog) == all).await;
    fake.set_names(11, &all[..9]);
    let asked = format!("{NAMES}?index=11&wait=60000ms");
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    assert_eq!(fake.n_asked(&format!("{NAMES}?consistent")), 1);
    assert_eq!(handle.stats.shrinks_held(), 1);
    // Its own answer decides.
    assert_eq!(n_serving(&handle.catalog.borrow().clone().unwrap().catalog), 10);
    fake.set(&service(all[9]), 21, json!([]));
    shows(&mut handle, |catalog| names(catalog) == all[..9]).await;
}

#[tokio::test]
async fn the_first_catalog_waits_for_what_the_kernel_serves() {
    let fake = Fake::start().await;
    for name in ["db", "web"] {
        fake.set(&service(name), 20, json!([instance("n1", "1", 1)]));
    }
    fake.set_names(10, &["db", "web"]);
    fake.break_path(&service("web"), Some(Fault::Status(500, "no leader")));
    let settings = settings(config(fake.address), WatchPolicy::Used, timing());
    let mut handle = follow_as(Settings { in_use: vec!["web".into()], ..settings });
    says(&mut handle, Some("service `web`: ")).await;
    tokio::time::sleep(timing().stragglers * 2).await;
    assert!(handle.catalog.borrow().is_none(), "it would take web out of the kernel");
    fake.break_path(&service("web"), None);
    let catalog = shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    assert_eq!(ports(&catalog, "web"), [1]);
}

#[tokio::test]
async fn a_lookup_of_a_name_that_goes_is_answered_and_so_is_the_next() {
    let (fake, mut handle) = cold().await;
    shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    fake.break_path(&service("web"), Some(Fault::Hang));
    let demand = handle.demand.clone();
    let waits = tokio::spawn(async move { demand.look_up("web").await });
    let mut asked = fake.state.subscribe();
    asked.wait_for(|state| state.asked.contains_key(&service("web"))).await.unwrap();
    fake.set_names(11, &["db"]);
    let lookup = tokio::time::timeout(LIMIT, waits).await.expect("an answer").unwrap();
    assert_eq!(lookup, Lookup::Absent);
    fake.break_path(&service("web"), None);
    assert_eq!(handle.demand.look_up("web").await, Lookup::Exists, "it is looked up again");
}

#[tokio::test]
async fn another_source_finds_the_former_ones_connections_closed() {
    let (fake, mut handle, _) = synced().await;
    let config = Config {
        consul: config(fake.address),
        state_dir: tempfile::tempdir().unwrap().path().into(),
        catalog: CatalogConfig { watch: WatchPolicy::Used, ..Config::default().catalog },
        ..Config::default()
    };
    let before = fake.state.borrow().most_connections;
    handle.reconfigure(&config, vec!["web".into()]).await;
    let is_asked = |state: &super::test_server::State| state.asked.get(&service("web")) >= Some(&2);
    let is_live =
        tokio::time::timeout(LIMIT, fake.state.subscribe().wait_for(is_asked)).await.is_ok();
    assert!(is_live, "what the kernel serves is live without anybody's asking");
    assert_eq!(handle.demand.look_up("web").await, Lookup::Exists);
    let state = fake.state.borrow().clone();
    assert!(state.most_connections <= before + 1, "{} after {before}", state.most_connections);
    handle.supervisor.0.abort_all();
    tokio::time::timeout(LIMIT, handle.supervisor.join()).await.expect("its end is seen");
}

/// Blocking queries end soon, and suspicions last.
fn watchful() -> Timing {
    let wait = Duration::from_millis(200);
    Timing { wait, first_wait: wait, distrust: LIMIT * 10, ..timing() }
}

/// As [`synced`], with these services of one instance each.
async fn synced_with(all: &[&str], timing: Timing) -> (Fake, Handle) {
    let fake = Fake::start().await;
    fake.set_names(10, all);
    for name in all {
        fake.set(&service(name), 20, json!([instance("n1", "1", 1)]));
    }
    let consul = ConsulConfig { max_connections: 32, ..config(fake.address) };
    let mut handle = follow(consul, timing);
    shows(&mut handle, |catalog| names(catalog) == all).await;
    says(&mut handle, None).await;
    (fake, handle)
}

fn n_serving(catalog: &Catalog) -> usize {
    catalog.values().filter(|listing| !listing.groups[0].instances.is_empty()).count()
}

#[tokio::test]
async fn a_body_applies_whatever_its_index() {
    let (fake, mut handle) = synced_with(&["web"], watchful()).await;
    // As after a policy was widened: an instance, and a name, that the token may see now.
    fake.set(&service("web"), 20, json!([instance("n1", "1", 1), instance("n1", "2", 2)]));
    shows(&mut handle, |catalog| ports(catalog, "web") == [1, 2]).await;
    fake.set(&service("db"), 20, json!([instance("n1", "1", 5432)]));
    fake.set_names(10, &["db", "web"]);
    shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    // One that only replaces another.
    fake.set(&service("db"), 20, json!([instance("n1", "2", 5433)]));
    shows(&mut handle, |catalog| ports(catalog, "db") == [5433]).await;
}

#[tokio::test]
async fn a_loss_without_a_new_index_is_reported_and_withheld() {
    let (fake, mut handle) = synced_with(&["db", "web"], watchful()).await;
    fake.set(&service("web"), 20, json!([]));
    says(&mut handle, Some("lack instances of `web`: nothing has changed in its state")).await;
    assert!(handle.health.borrow().is_failing);
    assert_eq!(handle.demand.look_up("made-up").await, Lookup::Unknown);
    fake.set_names(10, &["db"]);
    // An index that moves, for whatever reason, doesn't give the rights back.
    fake.set(&service("web"), 21, json!([]));
    let asked = format!("{}?index=21&wait=20ms", service("web"));
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    assert_eq!(n_serving(&handle.catalog.borrow().as_ref().unwrap().catalog), 2);
    fake.set_names(10, &["db", "web"]);
    fake.set(&service("web"), 21, json!([instance("n1", "1", 2)]));
    shows(&mut handle, |catalog| ports(catalog, "web") == [2]).await;
    says(&mut handle, None).await;
    // And where it is so for long enough, it is true.
    let (fake, mut handle) = synced_with(&["db", "web"], timing()).await;
    fake.set_names(11, &["db"]);
    fake.set(&service("web"), 5, json!([]));
    shows(&mut handle, |catalog| names(catalog) == ["db"]).await;
}

#[tokio::test]
async fn instances_that_acls_begin_to_filter_keep_serving() {
    let (fake, mut handle) = synced_with(&["web"], watchful()).await;
    fake.set_filtered(&service("web"), 21, json!([]));
    fake.set_filtered(NAMES, 11, json!({}));
    says(&mut handle, Some("leaves out what the token may not read, as it didn't")).await;
    // Another name joins nevertheless.
    fake.set(&service("db"), 30, json!([instance("n1", "1", 5432)]));
    fake.set_filtered(NAMES, 12, json!({"db": ["routed"]}));
    let catalog = shows(&mut handle, |catalog| n_serving(catalog) == 2).await;
    assert_eq!(ports(&catalog, "web"), [1]);
    for path in [NAMES.into(), service("web")] {
        fake.break_path(&path, None);
    }
    fake.set(&service("web"), 22, json!([instance("n1", "1", 2)]));
    fake.set_names(13, &["db", "web"]);
    shows(&mut handle, |catalog| ports(catalog, "web") == [2]).await;
    says(&mut handle, None).await;
}

#[tokio::test]
async fn new_instances_serve_in_addition_to_filtered_ones() {
    let (fake, mut handle) = synced_with(&["web"], watchful()).await;
    let three = [1, 2, 3].map(|n| instance("n1", &n.to_string(), n));
    fake.set(&service("web"), 21, json!(three));
    shows(&mut handle, |catalog| ports(catalog, "web") == [1, 2, 3]).await;
    fake.set_filtered(&service("web"), 22, json!([instance("n1", "9", 9)]));
    shows(&mut handle, |catalog| ports(catalog, "web") == [1, 2, 3, 9]).await;
}

#[tokio::test]
async fn an_answer_that_was_always_filtered_applies() {
    let fake = Fake::start().await;
    fake.set_filtered(&service("web"), 20, json!([instance("n1", "1", 1)]));
    fake.set_filtered(NAMES, 10, json!({"web": ["routed"]}));
    let mut handle = follow(config(fake.address), watchful());
    shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
    fake.set_filtered(&service("web"), 21, json!([]));
    shows(&mut handle, |catalog| n_serving(catalog) == 0).await;
    fake.set_filtered(NAMES, 11, json!({}));
    shows(&mut handle, Catalog::is_empty).await;
}

#[tokio::test]
async fn servers_that_lost_their_state_remove_nothing() {
    let (fake, mut handle) = synced_with(&["web"], watchful()).await;
    fake.set(NAMES, 3, json!({"consul": []}));
    fake.set(&service("web"), 2, json!([]));
    says(&mut handle, Some("its servers seem to have lost their state")).await;
    assert_eq!(handle.demand.look_up("made-up").await, Lookup::Unknown);
    assert_eq!(n_serving(&handle.catalog.borrow().as_ref().unwrap().catalog), 1);
    // Its agents register what they have once more.
    fake.set(&service("web"), 7, json!([instance("n1", "1", 2)]));
    fake.set(NAMES, 8, json!({"consul": [], "web": ["routed"]}));
    shows(&mut handle, |catalog| ports(catalog, "web") == [2]).await;
    says(&mut handle, None).await;
}

#[tokio::test]
async fn a_list_that_lost_even_consul_is_withheld() {
    let (fake, mut handle) = synced_with(&["web"], watchful()).await;
    fake.set(NAMES, 11, json!({"consul": [], "web": ["routed"]}));
    let asked = format!("{NAMES}?index=11&wait=200ms");
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    fake.set(NAMES, 12, json!({}));
    fake.set(&service("web"), 21, json!([]));
    says(&mut handle, Some("Consul's answers lack")).await;
    assert_eq!(names(&handle.catalog.borrow().as_ref().unwrap().catalog), ["web"]);
}

#[tokio::test]
async fn the_loss_of_all_services_at_once_applies_only_after_a_while() {
    let all = ["a", "b", "c", "d"];
    let (fake, mut handle) = synced_with(&all, watchful()).await;
    for name in all {
        fake.set(&service(name), 21, json!([]));
    }
    fake.set_names(11, &[]);
    says(&mut handle, Some("they all went at once")).await;
    shows(&mut handle, |catalog| n_serving(catalog) == 4).await;

    // A job that is stopped is none of that, nor is one whose checks all fail.
    let (fake, mut handle) = synced_with(&all, watchful()).await;
    fake.set(&service("a"), 21, json!([]));
    fake.set_names(11, &all[1..]);
    shows(&mut handle, |catalog| names(catalog) == all[1..]).await;
    let mut critical = instance("n1", "1", 1);
    critical["Checks"][0]["Status"] = json!("critical");
    for name in &all[1..] {
        fake.set(&service(name), 22, json!([critical]));
    }
    let is_out = |catalog: &Catalog| {
        catalog.values().all(|listing| !listing.groups[0].instances[0].health.serves())
    };
    shows(&mut handle, is_out).await;
    assert!(handle.health.borrow().problem.is_none());
}

#[tokio::test]
async fn a_name_that_goes_lingers_and_serves_again_at_once() {
    let (fake, mut handle) =
        synced_with(&["db", "web"], Timing { linger: LIMIT, ..timing() }).await;
    fake.set(&service("web"), 21, json!([]));
    fake.set_names(11, &["db"]);
    let asked = format!("{NAMES}?index=11&wait=60000ms");
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    let catalog = shows(&mut handle, |catalog| n_serving(catalog) == 1).await;
    assert_eq!(names(&catalog), ["db", "web"]);
    assert_eq!(handle.demand.look_up("web").await, Lookup::Exists);
    assert_eq!(handle.demand.look_up("made-up").await, Lookup::Absent);
    // Before the list has it again.
    fake.set(&service("web"), 22, json!([instance("n1", "1", 2)]));
    shows(&mut handle, |catalog| ports(catalog, "web") == [2]).await;
    fake.set_names(12, &["db", "web"]);
    let asked = format!("{NAMES}?index=12&wait=60000ms");
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    // The list comes first.
    fake.set_names(13, &["db"]);
    let asked = format!("{NAMES}?index=13&wait=60000ms");
    fake.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    fake.set(&service("web"), 23, json!([]));
    let catalog = shows(&mut handle, |catalog| n_serving(catalog) == 1).await;
    assert_eq!(names(&catalog), ["db", "web"]);
    // That a tag was taken away is somebody's wish.
    fake.set_names(14, &["db", "web"]);
    fake.set(&service("web"), 24, json!([instance("n1", "1", 3)]));
    shows(&mut handle, |catalog| ports(catalog, "web") == [3]).await;
    fake.set(NAMES, 15, json!({"db": ["routed"], "web": ["other"]}));
    shows(&mut handle, |catalog| names(catalog) == ["db"]).await;

    let linger = Duration::from_millis(50);
    let (fake, mut handle) = synced_with(&["db", "web"], Timing { linger, ..timing() }).await;
    fake.set(&service("web"), 21, json!([]));
    fake.set_names(11, &["db"]);
    shows(&mut handle, |catalog| names(catalog) == ["db"]).await;
    assert_eq!(handle.demand.look_up("web").await, Lookup::Absent);
}

#[tokio::test]
async fn another_token_in_its_file_repeats_all_blocking_queries() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    std::fs::write(&path, "first").unwrap();
    let fake = Fake::start().await;
    fake.set_names(10, &["web"]);
    fake.set(&service("web"), 20, json!([instance("n1", "web-1", 1)]));
    let token = Some(crate::config::Token::File(path.clone()));
    let mut handle = follow(ConsulConfig { token, ..config(fake.address) }, timing());
    shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
    let held = [
        format!("{NAMES}?index=10&wait=60000ms"),
        format!("{}?index=20&wait=60000ms", service("web")),
        format!("{}?index=1&wait=60000ms", kill_switch::PATH),
    ];
    let is_held =
        |state: &super::test_server::State| held.iter().all(|q| state.asked.contains_key(q));
    fake.state.subscribe().wait_for(is_held).await.unwrap();
    let n_asked = |state: &super::test_server::State| {
        [NAMES, &service("web"), kill_switch::PATH, AGENT]
            .map(|path| state.asked.get(path).copied())
    };
    let before = n_asked(&fake.state.borrow());
    std::fs::write(&path, "second").unwrap();
    let is_again = |state: &super::test_server::State| {
        n_asked(state).iter().zip(&before).all(|(n, was)| n > was)
    };
    let again = fake.state.subscribe().wait_for(is_again).await.is_ok();
    assert!(again);
    says(&mut handle, None).await;
}

#[tokio::test]
async fn no_wait_is_longer_than_the_run_has_lasted() {
    let first_wait = Duration::from_millis(20);
    let start = std::time::Instant::now();
    let (fake, _handle) = synced_with(&["web"], Timing { first_wait, ..timing() }).await;
    let waits = |state: &super::test_server::State| {
        let asked = state.asked.keys().filter_map(|question| question.split_once("&wait="));
        let waits = asked.map(|(_, wait)| wait.strip_suffix("ms").unwrap().parse::<u64>().unwrap());
        waits.collect::<std::collections::BTreeSet<_>>()
    };
    let grew = |state: &super::test_server::State| waits(state).len() > 5;
    let mut state = fake.state.subscribe();
    let seen = tokio::time::timeout(LIMIT, state.wait_for(grew)).await;
    let longest = *waits(&seen.expect("longer waits").unwrap()).last().unwrap();
    assert!(u128::from(longest) <= start.elapsed().as_millis(), "{longest} ms");
}

#[tokio::test]
async fn the_kill_switch_of_another_consul_applies_until_a_consistent_read_of_this_one() {
    let (fake, mut handle, _) = synced().await;
    fake.set(kill_switch::PATH, 40, json!([{"Value": null}]));
    handle.off.wait_for(|off| *off).await.unwrap();
    let other = Fake::start().await;
    other.set(kill_switch::PATH, 7, json!(null));
    let asked = format!("{}?consistent", kill_switch::PATH);
    other.break_question(&asked, Some(Fault::Hang));
    follow_in(&mut handle, settings(config(other.address), WatchPolicy::All, timing()));
    other.state.subscribe().wait_for(|state| state.asked.contains_key(&asked)).await.unwrap();
    assert!(*handle.off.borrow());
    other.break_question(&asked, None);
    let on = tokio::time::timeout(LIMIT, handle.off.wait_for(|off| !*off)).await;
    on.expect("translation").unwrap();
}

#[tokio::test]
async fn the_kill_switch_does_not_refresh_the_age_of_the_catalog() {
    let (fake, mut handle, _) = synced().await;
    for path in [NAMES.into(), service("web")] {
        fake.break_path(&path, Some(Fault::Status(500, "rpc error making call: EOF")));
        says(&mut handle, Some("rpc error")).await;
    }
    let before = handle.health.borrow().last_answer;
    for (index, off) in [(41, true), (42, false), (43, true)] {
        let body = if off { json!([{"Value": null}]) } else { json!(null) };
        fake.set(kill_switch::PATH, index, body);
        handle.off.wait_for(|is| *is == off).await.unwrap();
    }
    assert_eq!(handle.health.borrow().last_answer, before);
}

#[test]
fn the_selection_of_services_is_part_of_the_origin() {
    let first = settings(config("127.0.0.1:8500"), WatchPolicy::Used, timing());
    let with = |change: fn(&mut CatalogConfig)| {
        let mut catalog = (*first.catalog).clone();
        change(&mut catalog);
        Settings { catalog: Arc::new(catalog), ..first.clone() }.origin()
    };
    use crate::config::{AddressChoice, HealthPolicy};
    for change in [
        (|catalog| catalog.tag = "other".into()) as fn(&mut CatalogConfig),
        |catalog| drop(catalog.meta.insert("stage".into(), "live".into())),
        |catalog| catalog.health = HealthPolicy::Warning,
        |catalog| catalog.address = AddressChoice::Wan,
    ] {
        assert_ne!(with(change), first.origin());
    }
    assert_eq!(with(|catalog| catalog.watch = WatchPolicy::All), first.origin());
}

#[tokio::test]
async fn the_saved_catalog_serves_a_new_daemon_while_consul_is_down() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Some(dir.path().join(cache::FILE_NAME));
    let (fake, mut first) = cold().await;
    let with_cache = |fake: &Fake| Settings {
        cache: cache.clone(),
        ..settings(config(fake.address), WatchPolicy::Used, timing())
    };
    follow_in(&mut first, with_cache(&fake));
    shows(&mut first, |catalog| names(catalog) == ["db", "web"]).await;
    assert_eq!(first.demand.look_up("web").await, Lookup::Exists);
    let path = cache.clone().unwrap();
    let holds = |memory: Option<crate::catalog::snapshot::SavedCatalog>| {
        memory.is_some_and(|memory| !memory.services["web"].instances.is_empty())
    };
    let mut follower = FileWatcher::new(&path).unwrap();
    while !holds(cache::read(&path, LIMIT)) {
        tokio::time::timeout(LIMIT, follower.changed())
            .await
            .expect("nothing was written")
            .unwrap();
    }
    drop(first);

    fake.break_path(NAMES, Some(Fault::Close));
    let mut second = follow_as(with_cache(&fake));
    let catalog = shows(&mut second, |catalog| names(catalog) == ["db", "web"]).await;
    assert_eq!(ports(&catalog, "web"), [80]);
    assert!(second.health.borrow().last_answer.is_some(), "its age is the answer's");
    says(&mut second, Some("lost")).await;
    fake.break_path(NAMES, None);
    // It was in use, so it is live without anybody's asking.
    shows(&mut second, |catalog| catalog["web"].watch == Watch::Live).await;
}

#[tokio::test]
async fn a_clean_stop_saves_the_last_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(cache::FILE_NAME);
    let (fake, mut handle) = cold().await;
    // Left to itself it writes nothing in the time of this test.
    let timing = Timing { save: LIMIT, ..timing() };
    let settings = settings(config(fake.address), WatchPolicy::Used, timing);
    follow_in(&mut handle, Settings { cache: Some(path.clone()), ..settings });
    shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    assert_eq!(handle.demand.look_up("web").await, Lookup::Exists);
    handle.end().await;
    let left = cache::read(&path, LIMIT).unwrap();
    assert!(left.services["web"].used_at.is_some());
    assert_eq!(left.services["web"].instances.len(), 1);
}

#[tokio::test]
async fn a_new_configuration_loses_no_service() {
    let (fake, mut handle) = cold().await;
    shows(&mut handle, |catalog| names(catalog) == ["db", "web"]).await;
    assert_eq!(handle.demand.look_up("web").await, Lookup::Exists);
    let demand = handle.demand.clone();
    follow_in(&mut handle, settings(config(fake.address), WatchPolicy::All, timing()));
    let catalog = handle.catalog.borrow_and_update().clone().unwrap().catalog;
    assert_eq!(ports(&catalog, "web"), [80]);
    let all = |catalog: &Catalog| catalog.values().all(|listing| listing.watch == Watch::Live);
    let catalog = shows(&mut handle, all).await;
    assert_eq!((ports(&catalog, "web"), ports(&catalog, "db")), (vec![80], vec![5432]));
    assert_eq!(
        demand.look_up("db").await,
        Lookup::Exists,
        "who had it before is heard by the new source"
    );
}

#[tokio::test]
async fn a_use_makes_all_names_live_that_differ_in_case() {
    let fake = Fake::start().await;
    for (name, port) in [("WEB", 1), ("Web", 2), ("web", 3)] {
        let instance = instance("n1", &format!("{name}-1"), port);
        fake.set(&service(name), 20, json!([instance]));
    }
    fake.set_names(10, &["OTHER", "WEB", "Web", "web"]);
    let mut handle = follow_as(settings(config(fake.address), WatchPolicy::Used, timing()));
    let live = |catalog: &Catalog| {
        let live = catalog.iter().filter(|(_, listing)| listing.watch == Watch::Live);
        live.map(|(id, _)| id.name.to_string()).collect::<Vec<_>>()
    };
    let catalog = shows(&mut handle, |catalog| catalog.len() == 4).await;
    assert_eq!(live(&catalog), [""; 0]);
    handle.demand.used("web");
    let catalog = shows(&mut handle, |catalog| live(catalog) == ["WEB", "Web", "web"]).await;
    assert_eq!(["WEB", "Web", "web"].map(|name| ports(&catalog, name)), [[1], [2], [3]]);
    // A variant that comes later is live as the others are.
    fake.set(&service("wEB"), 20, json!([instance("n1", "wEB-1", 4)]));
    fake.set_names(11, &["OTHER", "WEB", "Web", "wEB", "web"]);
    shows(&mut handle, |catalog| live(catalog) == ["WEB", "Web", "wEB", "web"]).await;
}

#[tokio::test]
async fn a_node_of_the_same_name_in_another_datacenter_is_not_this_one() {
    let record = |id: &str, datacenter: &str, node_id: &str| {
        let mut record = instance("n1", id, 1);
        record["Service"]["Address"] = json!("127.0.0.1");
        record["Node"]["Datacenter"] = json!(datacenter);
        record["Node"]["ID"] = json!(node_id);
        record
    };
    let records = [
        record("here", "dc1", "9d75"),
        record("other-datacenter", "dc2", "9d75"),
        record("other-node", "dc1", "aaaa"),
    ];
    // (the agent's answer about itself, which instances are this node's)
    let config_of = json!({"NodeName": "n1", "NodeID": "9d75", "Datacenter": "dc1"});
    let elsewhere = json!({"Config": config_of, "Member": {"Addr": "192.0.2.77"}});
    for (agent, expected) in
        [(json!({"Config": config_of}), vec!["here"]), (elsewhere.clone(), vec![])]
    {
        let fake = Fake::start().await;
        fake.set(AGENT, 1, agent.clone());
        fake.set_names(10, &["web"]);
        fake.set(&service("web"), 20, json!(records));
        let mut handle = follow(config(fake.address), timing());
        let catalog = shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
        let local = catalog["web"].groups[0].instances.iter().filter(|instance| instance.local);
        assert_eq!(local.map(|instance| &*instance.id).collect::<Vec<_>>(), expected);
        let facts = handle.health.borrow().facts.join(" ");
        assert_eq!(facts.contains("192.0.2.77"), agent == elsewhere, "{facts}");
    }
}

#[tokio::test]
async fn an_agents_address_may_come_to_this_host_later() {
    let fake = Fake::start().await;
    let config_of = json!({"NodeName": "n1"});
    fake.set(AGENT, 1, json!({"Config": config_of, "Member": {"Addr": "192.0.2.77"}}));
    fake.set_names(10, &["web"]);
    fake.set(&service("web"), 20, json!([instance("n1", "web-1", 1)]));
    let mut handle = follow(config(fake.address), timing());
    let catalog = shows(&mut handle, |catalog| names(catalog) == ["web"]).await;
    let got = &catalog["web"].groups[0].instances[0];
    assert_eq!((got.local, got.may_be_local), (false, true));
    let facts = handle.health.borrow().facts.join(" ");
    assert!(facts.contains("its advertise_addr, 192.0.2.77,"), "{facts}");
    // Only another request shows it: nothing has failed.
    fake.set(AGENT, 1, json!({"Config": config_of, "Member": {"Addr": "127.0.0.1"}}));
    shows(&mut handle, |catalog| catalog["web"].groups[0].instances[0].local).await;
    assert!(handle.health.borrow().facts.is_empty());
}
