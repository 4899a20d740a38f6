// What the daemon reports: the stream of `/v1/stream`, with rates and a short history of each service.

/** How long a service's history is, in milliseconds. */
export const SPAN = 180_000;

/** The longest that the daemon, which reports every two seconds, may be silent, in milliseconds. */
const MAX_SILENCE = 10_000;

/** How long a page that nobody sees keeps its stream, in milliseconds: a browser has few connections to a daemon. */
const MAX_HIDDEN = 30_000;

export const store = {
  /** The status document; `null` before the first. */
  status: null,
  /** Services by name, each with `rate`: connections per second in the last interval. */
  services: new Map(),
  /** Grows with every change of `services`: the version of what is derived from them. */
  version: 0,
  /** `connecting`, `live` or `lost`. */
  link: "connecting",
  isPaused: false,
  /** Whether nobody has seen the page for a while, so that it follows nothing. */
  isUnseen: false,
};

const listeners = new Set();

/** Calls `listener` after each change. */
export function subscribe(listener) {
  listeners.add(listener);
}

function changed() {
  for (const listener of listeners) listener();
}

let source = null;
let lastEvent = 0;
let seconds = 0;
/** Times and connections per second, by service: two numbers a point. */
const history = new Map();
/** The services with connections in the last interval, and those of the one before that are still to be compared. */
let active = new Set();
let before = new Set();
let hidden = null;

export function connect() {
  source?.close();
  lastEvent = performance.now();
  source = new EventSource("v1/stream");
  source.addEventListener("status", (event) => {
    const now = performance.now();
    seconds = (now - lastEvent) / 1000;
    lastEvent = now;
    store.status = parse(event.data);
    store.link = "live";
    endRates();
    before = active;
    active = new Set();
    changed();
  });
  source.addEventListener("services", (event) => {
    const { all, services, removed } = parse(event.data);
    const former = all ? store.services : null;
    if (all) store.services = new Map();
    for (const service of services) {
      const last = (former ?? store.services).get(service.name);
      const n = last ? service.connects - last.connects : 0;
      // A counter that began again has no rate, nor has one across a gap.
      setRate(service, !all && n > 0 ? n / seconds : 0);
      store.services.set(service.name, service);
    }
    for (const name of removed) {
      store.services.delete(name);
      history.delete(name);
    }
    endRates();
    store.version += 1;
    changed();
  });
  source.addEventListener("error", () => {
    store.link = "lost";
    changed();
    // The browser connects again by itself, but not after a refusal.
    if (source?.readyState === EventSource.CLOSED) setTimeout(() => source && connect(), 3000);
  });
}

/** A service that isn't in an event's services has had no connections. */
function endRates() {
  for (const name of before) if (!active.has(name)) setRate(store.services.get(name), 0);
  before = new Set();
}

/** Ends the stream, or begins it again. */
export function pause(isPaused) {
  store.isPaused = isPaused;
  if (isPaused) close();
  else connect();
  changed();
}

function close() {
  source?.close();
  source = null;
}

/** Watches over the stream for as long as the page is open. */
export function watch() {
  // A host that is gone ends no connection.
  setInterval(() => {
    if (!source || performance.now() - lastEvent < MAX_SILENCE) return;
    store.link = "lost";
    connect();
    changed();
  }, 2000);
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hidden);
    if (document.hidden) {
      hidden = setTimeout(() => {
        store.isUnseen = true;
        close();
        changed();
      }, MAX_HIDDEN);
    } else {
      store.isUnseen = false;
      if (!source && !store.isPaused) connect();
    }
  });
}

function setRate(service, rate) {
  if (!service) return;
  service.rate = rate;
  const points = history.get(service.name) ?? [];
  if (rate === 0 && (points.length === 0 || points.at(-1) === 0)) return;
  if (rate > 0) active.add(service.name);
  points.push(lastEvent, rate);
  const first = points.findIndex((time, at) => at % 2 === 0 && time > lastEvent - SPAN);
  points.splice(0, first);
  history.set(service.name, points);
}

/** What a reader doesn't see or reads in another order, as the command line has it: any service may choose its names. */
const UNSEEN = /[\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

/** Controls as JSON has them, and the backslashes that are none. */
const CONTROL = /\\(?:u00([01][0-9a-f])|([bfnrt])|\\)/g;

/** Reads JSON, with such characters escaped. */
export function parse(json) {
  const unseen = (character) => `\\\\u{${character.codePointAt(0).toString(16)}}`;
  const control = (all, digits, letter) => (digits ? `\\\\u{${digits}}` : letter ? `\\\\${letter}` : all);
  return JSON.parse(json.replace(UNSEEN, unseen).replace(CONTROL, control));
}

/** The history of a service: times in milliseconds and rates, in turn. */
export function historyOf(name) {
  return history.get(name) ?? [];
}

/** A document of `/v1`; throws the server's text where there is none. */
export async function get(path) {
  const answer = await fetch(path);
  const isJson = answer.headers.get("content-type")?.startsWith("application/json");
  if (isJson) return parse(await answer.text());
  throw Object.assign(new Error((await answer.text()).trim() || answer.statusText), { status: answer.status });
}
