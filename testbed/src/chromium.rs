//! Chromium without a window, driven by its DevTools protocol over a pipe
//! (`--remote-debugging-pipe`: JSON documents, each with a NUL after it).

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use crate::TIMEOUT;
use crate::cleanup::Cleanup;
use crate::net::Host;
use crate::process::kill;
use crate::tempdir::TempDir;

/// How long the page itself may take until something is so, in milliseconds: less than [`TIMEOUT`].
const WAIT_MS: u32 = 120_000;

/// A browser on a host, with one page. It is killed on drop.
pub struct Chromium {
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    last_id: u64,
    session: Value,
    /// What the page has logged: errors, and what its policy has refused.
    complaints: Vec<Value>,
    _profile: TempDir,
    _cleanup: Cleanup,
}

impl Chromium {
    /// Starts it.
    ///
    /// # Errors
    /// When it isn't installed, or doesn't start.
    pub fn start(host: &Host) -> Result<Chromium> {
        let profile = TempDir::new("chromium")?;
        let mut command: Command = host.outside().command("sh");
        // The protocol's descriptors are 3 and 4.
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", "sh", "chromium"]);
        command.args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]);
        command.args([
            "--remote-debugging-pipe",
            "--no-first-run",
            "--disable-background-networking",
        ]);
        command.arg(format!("--user-data-dir={}", profile.path().display())).arg("about:blank");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start chromium")?;
        let (requests, answers) = (child.stdin.take(), child.stdout.take());
        let child: Arc<Mutex<Child>> = Arc::new(Mutex::new(child));
        let cleanup = Cleanup::new(move || kill(&child));
        let mut chromium = Chromium {
            requests: requests.context("a pipe")?,
            answers: BufReader::new(answers.context("a pipe")?),
            last_id: 0,
            session: Value::Null,
            complaints: Vec::new(),
            _profile: profile,
            _cleanup: cleanup,
        };
        let targets = chromium.call("Target.getTargets", json!({}))?;
        let targets = targets["targetInfos"].as_array().cloned().unwrap_or_default();
        let page = targets.iter().find(|target| target["type"] == "page").context("no page")?;
        let attach = json!({ "targetId": page["targetId"], "flatten": true });
        chromium.session = chromium.call("Target.attachToTarget", attach)?["sessionId"].clone();
        for domain in ["Page", "Runtime", "Log"] {
            chromium.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(chromium)
    }

    /// Calls a method of the protocol.
    ///
    /// # Errors
    /// When it fails, or doesn't answer in time.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.last_id += 1;
        let mut request = json!({ "id": self.last_id, "method": method, "params": params });
        if !self.session.is_null() {
            request["sessionId"] = self.session.clone();
        }
        write!(self.requests, "{request}\0").context("chromium has ended: is it installed?")?;
        loop {
            let answer = self.next().with_context(|| format!("{method} {params}"))?;
            if answer["id"] == self.last_id {
                ensure!(answer["error"].is_null(), "{method} {params}: {}", answer["error"]);
                return Ok(answer["result"].clone());
            }
            let event = answer["method"].as_str().unwrap_or_default();
            if matches!(event, "Log.entryAdded" | "Runtime.exceptionThrown") {
                self.complaints.push(answer["params"].clone());
            }
        }
    }

    fn next(&mut self) -> Result<Value> {
        let deadline = Instant::now() + TIMEOUT;
        if self.answers.buffer().is_empty() {
            let left = Timespec::try_from(deadline - Instant::now())?;
            let fd = PollFd::from_borrowed_fd(
                std::os::fd::AsFd::as_fd(self.answers.get_ref()),
                PollFlags::IN,
            );
            ensure!(poll(&mut [fd], Some(&left))? > 0, "no answer within {TIMEOUT:?}");
        }
        let mut answer = Vec::new();
        self.answers.read_until(0, &mut answer)?;
        ensure!(answer.pop() == Some(0), "chromium has ended: `chromium --version` shows why");
        Ok(serde_json::from_slice(&answer)?)
    }

    /// Opens an address, and waits until an expression in the page is true.
    ///
    /// # Errors
    /// When it isn't in time.
    pub fn open(&mut self, address: &str, until: &str) -> Result<()> {
        let opened = self.call("Page.navigate", json!({ "url": address }))?;
        ensure!(opened["errorText"].is_null(), "{address}: {}", opened["errorText"]);
        self.wait_for(until)
    }

    /// The value of an expression in the page; of a promise, what it comes to.
    ///
    /// # Errors
    /// When it throws.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let params =
            json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let outcome = self.call("Runtime.evaluate", params)?;
        if outcome["exceptionDetails"].is_null() {
            return Ok(outcome["result"]["value"].clone());
        }
        let start: String = expression.chars().take(300).collect();
        bail!("{start}: {}", outcome["exceptionDetails"])
    }

    /// Waits until an expression in the page is true, and looks at each of its frames.
    ///
    /// # Errors
    /// When it isn't in time.
    pub fn wait_for(&mut self, expression: &str) -> Result<()> {
        let look = format!(
            "new Promise((done, fail) => {{
                const end = performance.now() + {WAIT_MS};
                const look = () => {{
                    let is = false;
                    try {{ is = Boolean({expression}); }} catch {{}}
                    if (is) done(true);
                    else if (performance.now() > end) fail(document.body.innerText.slice(0, 2000));
                    else requestAnimationFrame(look);
                }};
                look();
            }})"
        );
        self.evaluate(&look).with_context(|| format!("waiting for {expression}")).map(drop)
    }

    /// Sets the size of the page in pixels, and the colour scheme that the person prefers.
    ///
    /// # Errors
    /// None but defects of the testbed.
    pub fn look(&mut self, width: u32, height: u32, scheme: &str) -> Result<()> {
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size)?;
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call("Emulation.setEmulatedMedia", media).map(drop)
    }

    /// Presses a key, such as `Tab` or `ArrowDown`, as a person at a keyboard does.
    ///
    /// # Errors
    /// None but defects of the testbed.
    pub fn press(&mut self, key: &str) -> Result<()> {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "End" => 35,
            "Home" => 36,
            "ArrowDown" => 40,
            _ => bail!("the testbed doesn't know the key {key}"),
        };
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let params = json!({ "type": kind, "key": key, "code": key, "text": text,
                "windowsVirtualKeyCode": code });
            self.call("Input.dispatchKeyEvent", params)?;
        }
        Ok(())
    }

    /// Types a text where the focus is.
    ///
    /// # Errors
    /// None but defects of the testbed.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({ "text": text })).map(drop)
    }

    /// The page's picture: PNG, in base64.
    ///
    /// # Errors
    /// None but defects of the testbed.
    pub fn screenshot(&mut self) -> Result<String> {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" }))?;
        Ok(shot["data"].as_str().context("a picture")?.to_owned())
    }

    /// What the page has logged so far: errors, and what its policy has refused.
    pub fn complaints(&self) -> &[Value] {
        &self.complaints
    }
}
