//! The harness, which `cargo xtask bench` starts.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::{Result, bail};
use lb_bench::draft::Draft;
use lb_bench::suites::SUITES;
use lb_tests::undo;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(done) = lb_bench::suites::change::helper(&arguments) {
        return done;
    }
    let is_quick = arguments.iter().any(|argument| argument == "--quick");
    undo::on_signals()?;
    let _conntrack = lb_bench::peers::Conntrack::enlarge()?;
    for name in arguments.iter().filter(|argument| !argument.starts_with('-')) {
        let Some(suite) = SUITES.iter().find(|suite| suite.name == name) else {
            bail!("no suite {name}");
        };
        show(&(suite.run)(is_quick)?);
    }
    Ok(())
}

fn show(draft: &Draft) {
    for figure in &draft.figures {
        println!("{} / {} ({})", figure.name, figure.condition, figure.unit);
        for row in &figure.rows {
            let told = |spread: Option<lb_bench::stats::Spread>| {
                spread.map_or(String::new(), |s| {
                    format!("{:.3} [{:.3} {:.3}]", s.median, s.least, s.most)
                })
            };
            println!("   {:<22} {:<40} {}", row.contender, told(row.spread), told(row.ratio));
        }
    }
    println!("{:#?}\n{:#?}", draft.goals, draft.notes);
}
