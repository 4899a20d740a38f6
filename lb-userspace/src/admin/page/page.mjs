// The frame of the page: what is shown is in its address.

import { Component, render } from "./vendor/preact/preact.mjs";
import { count, html, State } from "./format.mjs";
import { select, Services, STATES } from "./services.mjs";
import { connect, pause, store, subscribe, watch } from "./store.mjs";
import { Configuration, Connections, Dns, Edge, Overview, Service } from "./views.mjs";

const VIEWS = {
  overview: { title: "Overview", show: Overview },
  services: { title: "Services", show: Services },
  service: { title: "Services", show: Service, isHidden: true },
  connections: { title: "Connections", show: Connections },
  dns: { title: "DNS", show: Dns },
  edge: { title: "Edge", show: Edge },
  config: { title: "Configuration", show: Configuration },
};

/** What the address asks for. */
function query() {
  const given = new URLSearchParams(location.search);
  const view = Object.hasOwn(VIEWS, given.get("view") ?? "") ? given.get("view") : "overview";
  const text = (name) => given.get(name) ?? "";
  return { view, q: text("q"), state: text("state"), sort: text("sort") || "name", name: text("name"), outcome: text("outcome") };
}

/** The address of what differs from the present view. */
function address(change) {
  const given = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(change)) {
    if (value === "" || (name === "sort" && value === "name")) given.delete(name);
    else given.set(name, value);
  }
  return given.size > 0 ? `?${given}` : location.pathname;
}

let announced = 0;
/** Has a screen reader read a sentence, the last one of two seconds. */
function announce(sentence) {
  clearTimeout(announced);
  announced = setTimeout(() => {
    document.getElementById("announcer").textContent = sentence;
  }, 2000);
}

class Page extends Component {
  state = { query: query() };

  componentDidMount() {
    subscribe(() => this.schedule());
    addEventListener("popstate", () => this.show());
    document.addEventListener("click", this.onClick);
    this.title();
    connect();
    watch();
  }

  /** Draws at most once a frame. */
  schedule() {
    if (this.isScheduled) return;
    this.isScheduled = true;
    // A page in the background gets no frames.
    const next = document.hidden ? (draw) => setTimeout(draw, 1000) : requestAnimationFrame;
    next(() => {
      this.isScheduled = false;
      this.announceState();
      this.forceUpdate();
    });
  }

  /** Announces changes of readiness, and of the connection to the daemon. */
  announceState() {
    const { status, link } = store;
    const state = link === "lost" ? "The connection to nohop is lost." : status && (status.ready ? "nohop is ready." : `nohop is not ready. ${status.problems[0] ?? ""}`);
    if (state && this.lastState && state !== this.lastState) announce(state);
    this.lastState = state || this.lastState;
  }

  onClick = (event) => {
    const link = event.target.closest?.("a[href^='?']");
    if (!link || event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    history.pushState(null, "", link.getAttribute("href"));
    this.show(() => {
      scrollTo(0, 0);
      document.querySelector("h1").focus();
    });
  };

  show(then) {
    this.setState({ query: query() }, () => {
      this.title();
      then?.();
    });
  }

  title() {
    const { view, name } = this.state.query;
    const what = (view === "service" && name) || VIEWS[view].title;
    document.title = `${what} · nohop on ${location.host}`;
  }

  go = (change, isSameView) => {
    history[isSameView ? "replaceState" : "pushState"](null, "", address(change));
    this.show();
    const asked = query();
    if (asked.view === "services") announce(`${count(select(asked).length)} services, ${STATES[asked.state] ?? ""}`);
  };

  render(_, { query }) {
    const { status, link, isPaused } = store;
    const isLost = link === "lost" && !isPaused;
    const { show: View } = VIEWS[query.view];
    const isCurrent = (name) => name === query.view || (name === "services" && query.view === "service");
    const links = Object.entries(VIEWS).filter(([name, it]) => !it.isHidden && (name !== "edge" || status?.edge));
    return html`
      <header>
        <a class="name" href="?view=overview"><img src="icon.svg" alt="" width="20" height="20" />nohop</a>
        <nav aria-label="Views"><ul>${links.map(([name, { title }]) => html`<li><a href="?view=${name}" aria-current=${isCurrent(name) ? "page" : null}>${title}</a></li>`)}</ul></nav>
        <p class="link">${status && html`<${State} of=${isLost ? "lost" : status.ready ? "ready" : "not ready"} />`}
          <button type="button" aria-pressed=${isPaused ? "true" : "false"} onClick=${() => pause(!store.isPaused)}>${isPaused ? "Paused" : "Pause"}</button></p>
      </header>
      <main id="main">
        ${isLost && html`<p class="banner bad" role="alert"><${State} of="lost" /> The connection to the daemon is lost; this is what it reported last. Trying again…</p>`}
        ${status ? html`<${View} query=${query} go=${this.go} />` : html`<h1 tabindex="-1">${VIEWS[query.view].title}</h1><p class="quiet">Loading…</p>`}
      </main>
      <footer>${status && html`<p>nohop ${status.version} on ${location.host}, process ${status.pid}. Read-only: <code>nohop --help</code> lists what changes things.</p>`}</footer>`;
  }
}

render(html`<${Page} />`, document.getElementById("page"));
