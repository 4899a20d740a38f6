//! The command line as a person meets it: exit codes and messages. Nothing here needs root.
#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Output};

fn nohop(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nohop"));
    for variable in ["NOHOP_ADMIN", "CONSUL_HTTP_ADDR", "CONSUL_HTTP_TOKEN"] {
        command.env_remove(variable);
    }
    command.args(arguments).output().unwrap()
}

/// What it said on stderr, with its exit code.
fn said(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn file(name: &str, text: &str) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (directory, path)
}

#[test]
fn every_mistake_of_a_configuration_is_named_at_once() {
    let (_directory, path) = file(
        "nohop.toml",
        "stat_dir = \"/x\"\n[vip]\npool = \"127.128.0.0/24\"\nports = \"80\"\n\
         pins = { web = \"127.128.0.5:80\" }\n",
    );
    for command in ["run", "unload"] {
        let (code, text) = said(&nohop(&[command, "--config", &path]));
        assert_eq!(code, Some(2), "{text}");
        for part in [":1: stat_dir: ", ":4: vip.ports: ", "vip.pool", "vip.pins", "max_services"] {
            assert!(text.contains(part), "{command}: no {part:?} in:\n{text}");
        }
    }
}

#[test]
fn a_configuration_is_checked_without_a_daemon() {
    let (_directory, path) = file("good.toml", "dns.ttl = 5\n");
    let output = nohop(&["config", "check", &path]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{path}: no problems\n"));

    let (_directory, path) = file("bad.toml", "dns.tll = 5\n\nvip.ports = 80\n");
    let (code, text) = said(&nohop(&["config", "check", &path]));
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("bad.toml:1: dns.tll: ") && text.contains("bad.toml:3: "), "{text}");
    let output = nohop(&["config", "check", "--json", &path]);
    assert_eq!(output.status.code(), Some(2));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["ok"], report["problems"].as_array().unwrap().len()), (&false.into(), 2));

    for command in ["check", "migrate"] {
        let (code, text) = said(&nohop(&["config", command, "/nonexistent.toml"]));
        assert!(code == Some(2) && text.contains("/nonexistent.toml"), "{command}: {text}");
    }
    let default = "/etc/nohop/nohop.toml";
    if std::fs::symlink_metadata(default).is_err() {
        let output = nohop(&["config", "check"]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text, format!("there is no {default}: the defaults apply\n"));
    }
}

#[test]
fn a_migration_keeps_each_former_file() {
    let (directory, path) = file("nohop.toml", "plane.max_services = 5\n");
    let at = |name: &str| directory.path().join(name);
    std::os::unix::fs::symlink(&path, at("link.toml")).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    let migrate = || {
        let output = nohop(&["config", "migrate", "--apply", at("link.toml").to_str().unwrap()]);
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), output.stderr)
    };
    let mut changed = String::from("datapath.max_services = 5\n");
    for (former, before) in [
        ("nohop.toml.old", "plane.max_services = 5\n"),
        ("nohop.toml.old.1", "catalog.source = 'consul'\n"),
        ("nohop.toml.old.2", "plane.max_backends = 5\n"),
    ] {
        if former != "nohop.toml.old" {
            std::fs::write(&path, before).unwrap();
            changed = before.replace("source =", "sources =").replace("'consul'", "['consul']");
            changed = changed.replace("plane", "datapath");
        }
        let (code, text, _) = migrate();
        let is_former = format!("written; {} is the former file\n", at(former).display());
        assert!(code == Some(0) && text.ends_with(&is_former), "{text}");
        assert_eq!(std::fs::read_to_string(at(former)).unwrap(), before);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), changed);
        for file in [at(former), path.clone().into()] {
            assert_eq!(std::fs::metadata(file).unwrap().mode() & 0o777, 0o640);
        }
    }
    assert!(std::fs::symlink_metadata(at("link.toml")).unwrap().is_symlink());
    std::fs::write(&path, "[datapath]\n[plane]\n").unwrap();
    let (code, _, error) = migrate();
    let error = String::from_utf8(error).unwrap();
    let expected = "link.toml:2: plane and datapath are both there; merge them by hand";
    assert!(code == Some(2) && error.contains(expected), "{error}");
}

#[test]
fn what_a_catalog_has_that_cant_be_served_is_a_warning() {
    let (_directory, catalog) = file(
        "catalog.toml",
        "[[service]]\nname = 'a.b'\nbackend = [{ address = '10.0.0.7:1' }]\n[[service]]\n\
         name = 'web'\nbackend = [{ address = '0.0.0.0:80' }, { address = '10.0.0.7:80' }]\n",
    );
    let (_other, path) =
        file("nohop.toml", &format!("catalog = {{ sources = ['file'], file = {catalog:?} }}\n"));
    let output = nohop(&["config", "check", &path]);
    let (code, text) = said(&output);
    assert_eq!((code, text.lines().count()), (Some(0), 2), "{text}");
    for (line, expected) in
        text.lines().zip(["`a.b` can't be a DNS name", "service `web`: 0.0.0.0"])
    {
        assert!(line.starts_with(&format!("warning: {catalog}: {expected}")), "{text}");
    }
}

#[test]
fn completions_have_each_command_that_help_lists() {
    let help = nohop(&["help"]);
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = listed.take_while(|line| line.starts_with("  "));
    let commands: Vec<&str> = listed.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(commands.contains(&"explain") && commands.contains(&"completion"), "{help}");
    for (shell, first) in [("bash", "_nohop() {"), ("zsh", "#compdef nohop"), ("fish", "# Print")] {
        let output = nohop(&["completion", shell]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(script.starts_with(first), "{shell}: {script}");
        for command in &commands {
            assert!(script.contains(command), "no {command} for {shell}");
        }
        assert!(!script.contains("probe-connect"), "a hidden command for {shell}");
    }
    let (code, text) = said(&nohop(&["completion", "tcsh"]));
    assert!(code == Some(2) && text.contains("[possible values: bash, zsh, fish]"), "{text}");

    // What a person gets who types `nohop dra` and a tab.
    let words = "source <(\"$0\" completion bash) && COMP_WORDS=(nohop dra) COMP_CWORD=1 && \
                 _nohop nohop dra nohop && echo \"${COMPREPLY[@]}\"";
    let bash = Command::new("bash").args(["-c", words, env!("CARGO_BIN_EXE_nohop")]).output();
    let bash = bash.unwrap();
    assert_eq!(String::from_utf8_lossy(&bash.stdout), "drain\n", "{bash:?}");
}

#[test]
fn the_catalog_that_a_configuration_names_is_checked_along() {
    let (_directory, catalog) = file("catalog.toml", "service = []\n");
    let (_other, path) =
        file("good.toml", &format!("catalog = {{ sources = ['file'], file = {catalog:?} }}\n"));
    assert_eq!(nohop(&["config", "check", &path]).status.code(), Some(0));
    std::fs::write(&catalog, "[[service]]\nport = 1\n").unwrap();
    let output = nohop(&["config", "check", "--json", &path]);
    assert_eq!(output.status.code(), Some(2));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let problems = report["problems"].as_array().unwrap();
    assert_eq!(problems.len(), 2, "{report:#}");
    assert!(problems[0].as_str().unwrap().contains("catalog.toml:1: "), "{report:#}");
    std::fs::remove_file(&catalog).unwrap();
    let (code, text) = said(&nohop(&["config", "check", &path]));
    assert!(code == Some(2) && text.contains(&catalog), "{text}");
}

#[test]
fn a_bad_catalog_is_a_mistake_with_its_lines() {
    let (_directory, path) = file(
        "catalog.toml",
        "[[service]]\nname = \"web\"\n[[service.backend]]\naddress = \"10.0.0.7:1\"\n\
         [[service.backend]]\naddress = \"10.0.0.7:1\"\n[[service]]\nname = \"web\"\nbackend = []\n",
    );
    let (code, text) = said(&nohop(&["run", "--catalog", &path]));
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("catalog.toml:5") && text.contains("catalog.toml:7"), "{text}");
}

#[test]
fn without_a_daemon_the_clients_say_where_they_looked() {
    for command in [&["status"][..], &["services"], &["explain", "web"], &["reload"]] {
        let (code, text) =
            said(&nohop(&[command, &["--admin", "unix:/nonexistent/sock"]].concat()));
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("/nonexistent/sock") && text.contains("--admin"), "{text}");
    }
    let (code, text) = said(&nohop(&["status", "--admin", "nowhere"]));
    assert_eq!(code, Some(2), "{text}");
}

#[test]
fn wrong_usage_is_2() {
    for arguments in [
        &["explain"][..],
        &["dance"],
        &["run", "--dns-listen", "nowhere"],
        &["run", "--on-exit", "stay"],
        &["check", "--on-exit", "keep"],
    ] {
        let (code, text) = said(&nohop(arguments));
        assert_eq!(code, Some(2), "{arguments:?}: {text}");
    }
}

#[test]
fn dns_setup_reports_as_json() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    std::fs::write(root.path().join("etc/resolv.conf"), "nameserver 127.0.0.53\n").unwrap();
    let setups = |options: &[&str]| {
        let root = root.path().to_str().unwrap();
        let output = nohop(&[&["dns", "setup", "--json", "--root", root], options].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        report["setups"].as_array().unwrap().clone()
    };
    let recommended = setups(&[]);
    assert_eq!(recommended[0]["option"], "--systemd-resolved", "{recommended:?}");
    assert!(recommended[0]["reason"].as_str().unwrap().contains("127.0.0.53"), "{recommended:?}");
    assert_eq!(recommended[0]["lines"], serde_json::json!([]));
    let requested = setups(&["--nomad", "--docker"]);
    let options: Vec<_> = requested.iter().map(|setup| setup["option"].as_str()).collect();
    assert_eq!(options, [Some("--nomad"), Some("--docker")]);
    let lines = requested[0]["lines"].as_array().unwrap();
    assert!(lines.contains(&"    nameserver 169.254.53.53".into()), "{lines:?}");
    assert!(requested[0]["reason"].is_null());
    let undone = setups(&["--systemd-resolved", "--undo"]);
    assert!(undone[0]["lines"][0].as_str().unwrap().contains("nothing was changed"), "{undone:?}");
}

#[test]
fn check_reports_as_json_and_fails_where_something_is_missing() {
    let (_directory, catalog) = file("catalog.toml", "service = []\n");
    let arguments = ["check", "--json", "--catalog", &catalog, "--cgroup", "/tmp"];
    let output = nohop(&arguments);
    assert_eq!(output.status.code(), Some(1), "/tmp is no cgroup");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], false);
    let checks = report["checks"].as_array().unwrap();
    let found = |what: &str| checks.iter().find(|check| check["what"] == what).unwrap();
    assert_eq!(found("cgroup v2")["ok"], false);
    assert!(found("cgroup v2")["fix"].as_str().unwrap().contains("--cgroup"));
    assert_eq!(found("source file")["ok"], true, "{report:#}");
}
