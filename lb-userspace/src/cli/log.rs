//! `nohop log`: what the daemon logs, and another level of it while it runs.

use std::process::ExitCode;

use super::args::ClientArguments;
use super::process::{USAGE, environment, print, print_error, runtime};
use crate::admin::api::LogStatus;
use crate::admin::client;

/// Shows the filter, or sets it until the daemon ends.
pub fn run(filter: Option<&str>, client: &ClientArguments) -> anyhow::Result<ExitCode> {
    let address = client::find(client.admin.as_deref(), &environment)?;
    let runtime = runtime()?;
    let status: LogStatus = match filter {
        Some(filter) => runtime.block_on(client::post(&address, &client::log_path(filter)))?,
        None => runtime.block_on(client::get(&address, "/v1/log"))?,
    };
    match &status.problem {
        Some(problem) if !client.json => print_error(&format!("error: {problem}")),
        _ => print(client, &status, |status| format!("{}\n", status.filter))?,
    }
    // It refuses nothing but a filter that isn't one.
    Ok(if status.ok { ExitCode::SUCCESS } else { ExitCode::from(USAGE) })
}
