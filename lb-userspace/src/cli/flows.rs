//! `nohop flows`: the flows through this edge.

use super::args::{ClientArguments, ColorChoice};
use super::columns::{Cell, Palette, Tone, lines};
use super::format::duration;
use super::process::{environment, print, runtime};
use crate::admin::api::{FlowDocument, FlowsDocument};
use crate::admin::client;

/// How many flows are shown.
const N_SHOWN: usize = 100;

/// Shows the flows whose last packets are the latest, or with `top` those with the most bytes.
pub fn run(top: bool, client: &ClientArguments) -> anyhow::Result<()> {
    let address = client::find(client.admin.as_deref(), &environment)?;
    let by = if top { "bytes" } else { "time" };
    let path = format!("/v1/flows?by={by}&limit={N_SHOWN}");
    let flows: FlowsDocument = runtime()?.block_on(client::get(&address, &path))?;
    let palette = Palette::of_stdout(ColorChoice::Auto);
    print(client, &flows, |flows| text(flows, palette))
}

fn text(document: &FlowsDocument, palette: Palette) -> String {
    let FlowsDocument { total, flows } = document;
    if flows.is_empty() {
        return "no flows\n".to_owned();
    }
    let header =
        ["service", "client", "vip", "backend", "state", "packets", "bytes", "age", "idle"];
    let mut rows = vec![header.map(|name| Cell::new(name, Tone::Strong)).to_vec()];
    rows.extend(flows.iter().map(|flow| row(flow).map(Cell::from).to_vec()));
    let mut text: String = lines(&rows, palette).into_iter().map(|line| line + "\n").collect();
    if *total > flows.len() as u64 {
        text += &format!("{} of {total} flows\n", flows.len());
    }
    text
}

fn row(flow: &FlowDocument) -> [String; 9] {
    let FlowDocument { service, client, vip, backend, state, .. } = flow;
    [
        service.clone().unwrap_or_else(|| "-".to_owned()),
        client.to_string(),
        vip.to_string(),
        backend.to_string(),
        state.clone(),
        flow.packets.to_string(),
        flow.bytes.to_string(),
        duration(flow.age_seconds),
        duration(flow.idle_seconds),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_one_line_each() {
        let text = |flows: &FlowsDocument| super::text(flows, Palette::default());
        assert_eq!(text(&FlowsDocument::default()), "no flows\n");
        let flow = FlowDocument {
            service: Some("web".into()),
            client: "198.51.100.7:40000".parse().unwrap(),
            vip: "203.0.113.10:443".parse().unwrap(),
            backend: "10.0.0.7:8080".parse().unwrap(),
            source: "10.0.0.2:1024".parse().unwrap(),
            protocol: "tcp".into(),
            state: "established".into(),
            packets: 12,
            bytes: 3456,
            age_seconds: 7.0,
            idle_seconds: 1.0,
        };
        let shown = text(&FlowsDocument { total: 2, flows: vec![flow] });
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines.len(), 3, "{shown}");
        let words: Vec<&str> = lines[1].split_whitespace().collect();
        assert_eq!(
            words[..7],
            [
                "web",
                "198.51.100.7:40000",
                "203.0.113.10:443",
                "10.0.0.7:8080",
                "established",
                "12",
                "3456"
            ]
        );
        assert_eq!(lines[2], "1 of 2 flows");
    }
}
