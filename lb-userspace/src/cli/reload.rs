//! `nohop reload`

use std::process::ExitCode;

use super::args::ClientArguments;
use super::process::{FAILURE, USAGE, environment, print, print_error, runtime};
use crate::admin::{api, client};
use crate::daemon::reload::lines;

/// Asks the daemon to reload, and shows what became of it.
pub fn ask(client: &ClientArguments) -> anyhow::Result<ExitCode> {
    let address = client::find(client.admin.as_deref(), &environment)?;
    let reload: api::Reload = runtime()?.block_on(client::post(&address, "/v1/reload"))?;
    if reload.ok || client.json {
        print(client, &reload, |reload| lines(reload).join("\n") + "\n")?;
    } else {
        lines(&reload).iter().for_each(|line| print_error(line));
    }
    Ok(match (reload.ok, reload.problems.is_empty()) {
        (true, _) => ExitCode::SUCCESS,
        (false, false) => ExitCode::from(USAGE),
        (false, true) => ExitCode::from(FAILURE),
    })
}
