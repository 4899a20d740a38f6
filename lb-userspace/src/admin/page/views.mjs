// All views but the list of services.

import { Component } from "./vendor/preact/preact.mjs";
import { age, Commands, count, counted, Facts, html, micros, ports, rate, shellWord, State, Table } from "./format.mjs";
import { get, historyOf, parse, SPAN, store } from "./store.mjs";

const problems = (list) => list.length > 0 && html`<ul class="problems">${list.map((it) => html`<li>${it}</li>`)}</ul>`;

export function Overview() {
  const { status } = store;
  const { datapath, dns, pool } = status;
  let rates = 0;
  let inFlight = 0;
  const conditions = { down: 0, degraded: 0 };
  for (const it of store.services.values()) {
    rates += it.rate;
    inFlight += it.in_flight ?? 0;
    if (it.condition in conditions) conditions[it.condition] += 1;
  }
  const link = (state, n) => (n === 0 ? "none" : html`<a href="?view=services&state=${state}">${count(n)}</a>`);
  const maps = datapath.maps.map(({ name, entries, capacity }) => {
    const share = capacity > 0 ? entries / capacity : 0;
    return [html`<code>${name}</code>`, count(entries), count(capacity), html`<span class="share ${share > 0.9 ? "bad" : share > 0.75 ? "fair" : ""}">
      <span class="bar" aria-hidden="true"><span style=${{ width: `${Math.min(100, share * 100)}%` }}></span></span>${Math.round(share * 100)}%</span>`];
  });
  const counters = Object.entries(datapath.counters).filter(([, n]) => n > 0);
  return html`
    <h1 tabindex="-1">Overview</h1>
    <section class="banner ${status.ready ? (status.problems.length ? "fair" : "good") : "bad"}" aria-label="State">
      <p><${State} of=${status.ready ? "ready" : "not ready"} /> <span>${status.ready
        ? "Names are answered and connections translated." : "Names get SERVFAIL until this is fixed:"}</span></p>
      ${problems(status.problems)}
    </section>
    <dl class="figures">
      <div><dt>Services</dt><dd>${count(status.services)}</dd></div>
      <div><dt>Down</dt><dd>${link("down", conditions.down)}</dd></div>
      <div><dt>Degraded</dt><dd>${link("degraded", conditions.degraded)}</dd></div>
      <div><dt>Healthy instances</dt><dd>${count(status.backends)}</dd></div>
      <div><dt>Connects/s</dt><dd>${rate(rates)}</dd></div>
      <div><dt>In flight</dt><dd>${count(inFlight)}</dd></div>
    </dl>
    <div class="columns"><div>
      <section><h2>Discovery</h2>
        <${Table} caption="Sources" heads=${["Source", "State", "#Last answer", "#Services followed"]} rows=${status.sources.map((it) => [
          it.name, html`<${State} of=${it.state} />`, it.age_seconds == null ? "none yet" : `${age(it.age_seconds)} ago`,
          it.watches ? `${count(it.watches.live)} of ${count(it.watches.live + it.watches.cold)}` : "all"])} />
        ${status.sources.flatMap((it) => it.facts).map((fact) => html`<p class="quiet">${fact}</p>`)}
        <${Facts} of=${[["Table", `generation ${status.generation}`], ["Drains by hand", status.drains || null],
          ["VIPs in use", `${count(pool.used)} of ${count(pool.size)}${pool.quarantined ? `, ${count(pool.quarantined)} in quarantine` : ""}`]]} />
      </section>
      <section><h2>DNS</h2>
        <${Facts} of=${[["Answers", html`<code>*.${dns.domain}</code>`], ["Listens on", [...dns.listen, ...dns.listen_tls.map((it) => `${it} (TLS)`)].join(", ")],
          ["Upstream resolvers", html`${count(dns.upstreams.filter((it) => it.state === "up").length)} of ${count(dns.upstreams.length)} up, <a href="?view=dns">details</a>`]]} />
        <${Table} caption="Events since the start" heads=${["Event", "#Times"]} rows=${counters.map(([name, n]) => [html`<code>${name}</code>`, count(n)])} />
      </section>
    </div><div>
      <section><h2>Kernel</h2>
        <${Table} caption="Units" heads=${["Unit", "State", "Reason"]} rows=${datapath.units.map((it) => [it.name, html`<${State} of=${it.state} />`, it.reason ?? ""])} />
        <${Facts} of=${[["Hooks", html`<${State} of=${datapath.attached ? "attached" : "detached"} />`],
          ["Mode", html`<${State} of=${datapath.mode} /> ${datapath.mode_reason ?? ""}`],
          ["Cgroup", html`<code>${datapath.cgroup}</code>`], ["This kernel lacks", datapath.limits.join("; ")]]} />
      </section>
      <section><h2>Maps</h2><${Table} caption="Room in the kernel's maps" heads=${["Map", "#Entries", "#Capacity", "#Used"]} rows=${maps} /></section>
    </div></div>
    <${Commands} of=${[["nohop check", "checks what nohop needs, and prints how to fix what is missing"],
      ["nohop reload", "applies the configuration file, or reports why not"], ["nohop drain TARGET", "no new connections from this node to a node, an address, an instance or an allocation"]]} />`;
}

/** Connections per second of the last three minutes, as a line. */
function Sparkline({ name }) {
  const [width, height] = [600, 72];
  const now = performance.now();
  const points = historyOf(name);
  let most = 0;
  const steps = [];
  for (let at = 0; at < points.length; at += 2) {
    const [time, value] = [points[at], points[at + 1]];
    if (time < now - SPAN) continue;
    most = Math.max(most, value);
    steps.push([time, value]);
  }
  const x = (time) => Math.max(0, width - ((now - time) / SPAN) * width).toFixed(1);
  const y = (value) => (height - 4 - (most > 0 ? value / most : 0) * (height - 12)).toFixed(1);
  let path = `M0 ${y(0)}`;
  for (const [time, value] of steps) path += `H${x(time)}V${y(value)}`;
  path += `H${width}`;
  const present = store.services.get(name)?.rate ?? 0;
  const text = `${rate(present)} connects per second now, ${rate(most)} at most in the last 3 minutes since this page was opened`;
  return html`<figure class="spark"><svg viewBox="0 0 ${width} ${height}" preserveAspectRatio="none" role="img" aria-label=${text}>
      <path class="area" d="${path}V${height}H0z" /><path class="line" d=${path} /></svg>
    <figcaption><strong>${rate(present)}</strong> connects/s now, ${rate(most)} at most in the last 3 minutes</figcaption></figure>`;
}

/** A document that is fetched once, or with each of the daemon's reports. */
class Fetched extends Component {
  state = { document: null, error: null };

  componentDidMount() {
    this.load();
  }

  componentDidUpdate(last) {
    if (last.path !== this.props.path) this.setState({ document: null, error: null });
    // On the unix socket the daemon asks its source for each.
    const isNews = this.props.live && store.status !== this.seen && !store.isPaused && !document.hidden;
    if (last.path !== this.props.path || isNews) this.load();
  }

  async load() {
    const { path } = this.props;
    this.seen = store.status;
    if (this.loading === path || (this.forbidden === path && performance.now() < this.again)) return;
    this.loading = path;
    try {
      const document = await get(path);
      if (path === this.props.path) this.setState({ document, error: null });
    } catch (error) {
      // The configuration decides on that, which a reload may change: the next request is half a minute later.
      if (error.status === 403) [this.forbidden, this.again] = [path, performance.now() + 30_000];
      if (path === this.props.path) this.setState({ error: error.message });
    }
    this.loading = null;
  }

  render({ children }, { document, error }) {
    const failure = error && html`<p class="banner fair" role="alert">${document ? `Can’t refresh: ${error}. Last known state:` : error}</p>`;
    if (!document) return failure || html`<p class="quiet">Loading…</p>`;
    return html`${failure}${children(document)}`;
  }
}

export function Service({ query }) {
  const { name } = query;
  // No service can be called so, and an address wouldn't keep it.
  if (/^\.{0,2}$/.test(name)) return html`<h1 tabindex="-1">Service</h1><p>The address names no service: <a href="?view=services">all services</a>.</p>`;
  return html`<h1 tabindex="-1">${name}</h1>
    <${Fetched} path="v1/services/${encodeURIComponent(name)}" live=${true}>${(it) => html`<${ServiceDetails} explanation=${it} name=${name} />`}</>`;
}

function ServiceDetails({ explanation, name }) {
  const { service } = explanation;
  const brief = store.services.get(name);
  const reach = service ? `${service.vip}${service.ports !== "any" && service.ports.length === 1 ? `:${service.ports[0]}` : ""}` : "";
  const notes = [...(service?.error ? [service.error] : []), ...(service?.notes ?? []), ...explanation.notes];
  const ids = new Set((service?.backends ?? []).map((it) => `${it.node}/${it.instance}`));
  const out = explanation.instances.filter((it) => it.state === "out" && !ids.has(`${it.node}/${it.instance}`));
  const rows = [...(service?.backends ?? []), ...out];
  const instances = rows.map((it) => [
    html`<span title=${it.instance}>${it.instance_name}</span><span class="below">${it.node}</span>`,
    html`<${State} of=${it.state} />${it.reason && html`<span class="reason">${it.reason}</span>`}`,
    html`<code>${it.address}</code>`,
    count(it.weight), count(it.in_flight), count(it.connects), count(it.failures), micros(it.connect_us),
    html`<code>nohop ${it.drained_by ? `undrain ${shellWord(it.drained_by)}` : `drain ${shellWord(it.address)}`}</code>`,
  ]);
  return html`
    <section class="banner ${{ healthy: "good", degraded: "fair", down: "bad" }[brief?.condition] ?? ""}" aria-label="Next connection">
      <p>${brief && html`<${State} of=${brief.condition} />`} <span>${explanation.connect}</span></p>
      ${problems(notes)}
    </section>
    ${service && html`
      <${Sparkline} name=${name} />
      <${Facts} of=${[["VIP", html`<code>${reach}</code>`], ["IPv6", service.vip6], ["Ports", ports(service.ports)], ["Protocol", service.protocol],
        ["Algorithm", service.algorithm], ["Pinned to", service.pin], ["Public", service.public.join(", ")],
        ["Source", [explanation.source, ...explanation.shadowed.map((it) => `${it} (ignored)`)].filter(Boolean).join(", ")],
        ["Instances followed", service.watch === "live" ? "yes" : "no: nothing on this node uses it"],
        ["Connects", count(service.connects)], ["In flight", count(service.in_flight)], ["Failed", count(service.failed)],
        ["Refused", count(service.refused + service.refused_family)], ["SYNs sent again", count(service.syn_retransmits)],
        ["UDP connects", service.udp_connects + service.udp_connects_refused > 0 ? `${count(service.udp_connects)}, ${count(service.udp_connects_refused)} refused` : null],
        ["Only counted (shadow mode)", service.shadowed > 0 ? count(service.shadowed) : null]]} />`}
    <h2>Instances</h2>
    <${Table} caption="Instances of ${name}" heads=${["Instance and node", "State and reason", "Address", "#Weight", "#In flight", "#Connects", "#Failures", "#Connect time", "To change it"]}
      rows=${instances} empty="None is registered." />
    <${Commands} of=${[[`nohop explain ${shellWord(name)}`, "the same, with each check's output"], [`nohop trace ${shellWord(name)}`, "its connections as they happen"],
      ["nohop drain TARGET", "no new connections to a node, an address, an instance or an allocation; undrain ends that"]]} />
    <p><a href="?view=connections&name=${encodeURIComponent(name)}">Connections to it, live</a></p>`;
}

const OUTCOMES = ["established", "refused", "failed", "aborted", "sent", "unknown", "intercepted", "passed", "begun", "ended"];
/** The connections that are shown, the latest ones. */
const MAX_LINES = 200;

export class Connections extends Component {
  state = { lines: [], lost: 0, isOn: false, error: null, why: null };

  componentWillUnmount() {
    this.abort?.abort();
  }

  componentDidUpdate(last) {
    if (!this.state.isOn) return;
    const { name, outcome } = this.props.query;
    // The daemon has few places for those who follow connections.
    if (store.isPaused) this.stop("Stopped by Pause.");
    else if (store.isUnseen) this.stop("Stopped, as the page was in the background.");
    else if (last.query.name !== name || last.query.outcome !== outcome) this.start();
  }

  stop = (why = null) => {
    this.abort?.abort();
    clearTimeout(this.timer);
    this.timer = null;
    this.setState({ ...this.taken(), isOn: false, why });
  };

  /** What is shown, with what has come since the last time. */
  taken() {
    const pending = this.pending ?? [];
    this.pending = [];
    const lost = pending.reduce((sum, line) => sum + (line.lost ?? 0), 0);
    const lines = [...pending.filter((line) => line.lost == null).reverse(), ...this.state.lines];
    return { lines: lines.slice(0, MAX_LINES), lost: this.state.lost + lost };
  }

  start = async () => {
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    this.pending = [];
    this.setState({ lines: [], lost: 0, isOn: true, error: null, why: null });
    const { name, outcome } = this.props.query;
    const query = new URLSearchParams();
    if (name) query.set("service", name);
    if (outcome) query.set("outcome", outcome);
    try {
      const answer = await fetch(`v1/trace?${query}`, { signal: abort.signal });
      if (!answer.ok) throw new Error((await answer.text()).trim());
      await this.read(answer.body.pipeThrough(new TextDecoderStream()).getReader());
      throw new Error("The daemon has ended the stream.");
    } catch (error) {
      if (!abort.signal.aborted) this.setState({ error: error.message, isOn: false });
    }
  };

  async read(reader) {
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      this.pending = [...(this.pending ?? []), ...lines.filter(Boolean).map((line) => parse(line))].slice(-MAX_LINES);
      // However many there are, they are drawn a few times a second.
      this.timer ??= setTimeout(() => {
        this.timer = null;
        this.setState(this.taken());
      }, 250);
    }
  }

  render({ query, go }, { lines, lost, isOn, error, why }) {
    const who = (it) => html`<span title=${it.cgroup}>${it.client_name ?? ""}</span>`;
    const backend = (it) => html`<code>${it.backend}</code>${it.instance_name && html`<span class="below" title=${it.instance}>${it.instance_name}</span>`}`;
    const rows = lines.map((it) => [
      new Date(it.time * 1000).toLocaleTimeString("en-GB"),
      // Flows through an edge have a client instead of a process.
      it.client ? "edge" : html`${it.comm} <span class="quiet">${it.pid}</span>`, it.client ? html`<code>${it.client}</code>` : who(it),
      it.service ? html`<a href="?view=service&name=${encodeURIComponent(it.service)}">${it.service}</a>` : "none",
      html`<code>${it.frontend ?? it.vip}</code>`, it.backend ? backend(it) : "–",
      html`<${State} of=${it.outcome} />`, html`<span class="reason">${[it.error, it.reason].filter(Boolean).join(", ")}</span>`, micros(it.connect_us)]);
    return html`<h1 tabindex="-1">Connections</h1>
      <form class="filters" onSubmit=${(event) => { event.preventDefault(); this.start(); }}>
        <label>Service <input name="name" value=${query.name} placeholder="all" autocomplete="off" spellcheck="false" onChange=${(event) => go({ name: event.target.value.trim() }, true)} /></label>
        <label>Outcome <select name="outcome" onChange=${(event) => go({ outcome: event.target.value }, true)}>
          <option value="">all</option>${OUTCOMES.map((it) => html`<option value=${it} selected=${it === query.outcome}>${it}</option>`)}</select></label>
        ${isOn ? html`<button type="button" class="main" onClick=${() => this.stop()}>Stop</button>` : html`<button class="main" disabled=${store.isPaused}>Start</button>`}
        <p class="quiet">${isOn ? "The kernel reports each connection while this runs." : why ?? (store.isPaused ? "Updates are paused." : "Nothing is traced until you start.")}</p>
      </form>
      ${error && html`<div class="banner fair" role="alert"><p>${error}</p>
        <p>A trace shows processes, so it is for the unix socket by default. Forward it over SSH, and open <code>http://localhost:9153/</code> there:</p>
        <p><code>ssh -L 9153:/run/nohop/admin.sock root@${location.hostname}</code></p></div>`}
      ${lost > 0 && html`<p class="banner fair">${counted(lost, "connection")} not shown: there were more than could be read.</p>`}
      <${Table} caption="Connections, the latest first" heads=${["Time", "Process", "Client", "Service", "To", "Backend", "Outcome", "Reason", "#Connect time"]} rows=${rows}
        empty=${isOn ? "Waiting for a connection to a VIP…" : null} />
      <${Commands} of=${[[`nohop trace${query.name ? ` ${shellWord(query.name)}` : ""}`, "the same in a terminal"]]} />`;
  }
}

export function Dns() {
  const { dns } = store.status;
  const upstreams = dns.upstreams.map((it) => [
    html`<code>${it.address}</code>`, html`<${State} of=${it.tcp_state === "up" ? it.state : it.tcp_state} />`, count(it.sent),
    ...["answered", "refused", "timeout", "unreachable"].map((result) => count(it.results[result] ?? 0)),
    it.mean_ms == null ? "–" : micros(Math.round(it.mean_ms * 1000))]);
  const names = store.status.datapath.units.find((it) => it.name === "names");
  return html`<h1 tabindex="-1">DNS</h1>
    <${Facts} of=${[["Answers", html`<code>*.${dns.domain}</code>`], ["Listens on", dns.listen.join(", ")], ["Over TLS", dns.listen_tls.join(", ")],
      ["Answered by the kernel", names && html`<${State} of=${names.state} /> ${names.reason ?? ""}`]]} />
    <h2>Upstream resolvers</h2>
    <${Table} caption="Resolvers for other names" heads=${["Resolver", "State", "#Sent", "#Answered", "#Refused", "#Timed out", "#Unreachable", "#Mean time"]} rows=${upstreams} empty="None: other names aren't forwarded." />
    <${Commands} of=${[["nohop dns query NAME", "what the server answers, and where that comes from"], ["nohop dns setup", "how this machine's resolver comes to ask nohop"]]} />`;
}

/** The meanings of what becomes of packets and flows, by their names in `status`. */
const DECISIONS = {
  forwarded: "packets translated at TC", xdp_tx: "packets translated at XDP, and sent back", xdp_redirect: "packets translated at XDP, to another interface", flows_begun: "flows that began", flows_expired: "flows that ended by their time",
  flows_taken: "flows whose place another one got, as room was short", icmp_errors: "ICMP errors that were translated",
  client_shown: "SYNs with the client's address", client_not_shown: "SYNs that had no room for it",
};
const REFUSALS = {
  no_frontend: "to a port that no service has", no_backend: "no healthy instance", no_port: "all ports that were tried are in use: more edge.source helps",
  table_full: "too many open flows: see edge.max_flows", syn_flood: "too many first packets while room is short", unknown_flow: "of no known flow: a RST was sent",
  no_route: "no route to where it goes", hop_limit: "the TTL ends here", too_long: "longer than the link takes", fragment: "a fragment",
  martian: "from an address that can't be answered", bad_header: "lengths that don't agree", bad_checksum: "a SYN with a wrong checksum", broken: "couldn't be changed",
};

export function Edge() {
  const { edge } = store.status;
  if (!edge) return html`<h1 tabindex="-1">Edge</h1><p>This node is no edge: <code>edge.interfaces</code> isn't set.</p>`;
  const flows = (it) => it.flows.map((flow) => [
    html`<code>${flow.client}</code>`, flow.service ?? "none", html`<code>${flow.vip}</code>`, html`<code>${flow.backend}</code>`, flow.protocol, flow.state,
    count(flow.packets), count(flow.bytes), age(flow.age_seconds), age(flow.idle_seconds)]);
  const packets = (isRefusal) => Object.entries(edge.packets).filter(([name, n]) => n > 0 && name in REFUSALS === isRefusal)
    .map(([name, n]) => [html`<code>${name}</code>`, REFUSALS[name] ?? DECISIONS[name] ?? "", count(n)]);
  const isProven = edge.proof === "passed";
  const share = edge.capacity > 0 ? ` (${Math.round((100 * edge.flows) / edge.capacity)}%)` : "";
  return html`<h1 tabindex="-1">Edge</h1>
    <section class="banner ${!edge.withdrawn ? "good" : edge.announced.length > 0 ? "fair" : "bad"}" aria-label="State">
      <p><${State} of=${edge.announced.length > 0 ? "announced" : "not announced"} /> <span>${edge.announced.join(", ") || "No public address is announced."}</span></p>
      ${problems(edge.withdrawn ? [edge.withdrawn] : [])}</section>
    <${Facts} of=${[["Flows", `${count(edge.flows)} of ${count(edge.capacity)}${share}`],
      ["Proof that packets are translated", html`<${State} of=${isProven ? "passed" : edge.proof ? "failed" : "unknown"} /> ${isProven ? "" : edge.proof ?? "none was possible yet"}`],
      ["Servers see clients' addresses", edge.client_address.join(", ")]]} />
    <div class="columns"><div>
      <section><h2>Interfaces</h2>
        <${Table} caption="Interfaces" heads=${["Interface", "Attached as", "Remark"]} rows=${edge.interfaces.map((it) => [it.name, it.mode ?? html`<${State} of="detached" />`, it.message ?? ""])} /></section>
      <section><h2>Packets and flows</h2>
        <${Table} caption="What was sent on" heads=${["Name", "Meaning", "#Times"]} rows=${packets(false)} empty="None yet." /></section>
    </div><div>
      <section><h2>Packets that were not sent on</h2>
        <${Table} caption="Packets that were not sent on" heads=${["Reason", "Meaning", "#Packets"]} rows=${packets(true)} empty="None." /></section>
    </div></div>
    <h2>Flows</h2>
    <${Fetched} path="v1/flows?by=bytes&limit=100" live=${true}>${(it) => html`<${Table} caption="The largest flows"
      heads=${["Client", "Service", "To", "Backend", "Protocol", "State", "#Packets", "#Bytes", "#Age", "#Idle"]} rows=${flows(it)} empty="None." />`}</>
    <${Commands} of=${[["nohop flows", "the same in a terminal"], ["nohop trace --outcome refused", "packets that are refused, as they come"],
      ["nohop drain edge", "this edge stops announcing, and new clients go to others"]]} />`;
}

export function Configuration({ query, go }) {
  const text = (value) => (typeof value === "string" ? `"${value}"` : JSON.stringify(value));
  const isSame = (it) => JSON.stringify(it.value) === JSON.stringify(it.default);
  const rows = (list) => list.filter((it) => it.key.includes(query.q) || text(it.value).includes(query.q))
    .filter((it) => query.state !== "changed" || !isSame(it))
    .map((it) => [html`<code>${it.key}</code>`, html`<code>${text(it.value)}</code>`, isSame(it) ? html`<span class="quiet">default</span>` : html`<strong>set</strong>`,
      it.text, it.restart ? `restart: ${it.restart}` : "reload"]);
  return html`<h1 tabindex="-1">Configuration</h1>
    <form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
      <label>Search <input type="search" name="q" value=${query.q} autocomplete="off" spellcheck="false" onInput=${(event) => go({ q: event.target.value }, true)} /></label>
      <label>Show <select name="state" onChange=${(event) => go({ state: event.target.value }, true)}>
        <option value="">all</option><option value="changed" selected=${query.state === "changed"}>only what is set</option></select></label>
    </form>
    <${Fetched} path="v1/config">${(it) => html`<${Table} caption="Configuration in force" heads=${["Key", "Value", "From", "Meaning", "A change needs"]} rows=${rows(it)} empty="Nothing matches." />`}</>
    <${Commands} of=${[["nohop config show", "where each value comes from"], ["nohop config check FILE", "checks a file"], ["nohop reload", "applies the file"]]} />`;
}
