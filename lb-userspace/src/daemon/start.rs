//! How the daemon starts.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use anyhow::Context;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::drains::DrainBook;
use super::notify::Notify;
use super::pipeline::Pipeline;
use super::prober::BackendProber;
use super::recorder::{self, Recorder};
use super::reload::{self, ReloadCounts};
use super::shadow_mode::{OffFile, ShadowSwitch};
use super::state_lock::StateLock;
use super::tasks::Tasks;
use super::trace::Tracer;
use super::view::DaemonView;
use super::{Daemon, MAX_REQUESTS, kept_for, tcp_access};
use super::{deadline, edge, ejected, kernel_reports, names, network, revision, unreachable};
use crate::admin::{View as _, api};
use crate::catalog::Sources;
use crate::catalog::resolve::Resolver;
use crate::config::{Config, TraceAccess, cgroup};
use crate::datapath::{Datapath, Mode, Options, SharedDatapath, announce_start, route};
use crate::table::Builder;
use crate::{admin, catalog, dns};

impl Daemon {
    /// Starts the parts.
    pub(super) async fn start(
        config: Config,
        read: reload::Read,
        servers: Handle,
    ) -> anyhow::Result<Daemon> {
        let scope = scope(&config)?;
        catalog::check_first(&config)?;
        // Exclusive resources come first, so that a second daemon disturbs nothing.
        let admin_listeners = admin::bind(&config.admin.listen)?;
        announce_start(&config.bpffs);
        let dns_sockets = dns::bind(&config.dns).await?;
        let dns_addresses = dns_sockets.addresses().to_vec();
        let listen_tls = dns_sockets.tls_addresses().to_vec();

        let state_lock = StateLock::take(&config.state_dir).await?;
        let vips = recorder::load(&config.state_dir, (&config.vip).into());
        let exposed = recorder::exposure(&config.state_dir);
        let (mut vips, drains, exposed) =
            tokio::join!(vips, DrainBook::open(&config.state_dir), exposed);
        let drains = drains.context("can't start a thread")?;
        let recorder = Recorder::start(&config.state_dir).context("can't start a thread")?;
        for pool in config.vip.pools() {
            route::add_unreachable(pool).await?;
        }
        let off_file = OffFile::watch(&config).await.context("can't start a thread")?;
        let mut shadow = ShadowSwitch::new(&config, off_file.is_there());
        let is_shadow = shadow.mode(false) != Mode::Translate;
        // Nothing after this fails except for lack of threads or file descriptors: then what is attached
        // stays, as after a crash.
        let map_creator = Some("/proc/self/exe".into());
        let options = Options { is_shadow, map_creator, ..Options::of(&config, &scope) };
        let mut datapath = Datapath::start(&options)?;
        if datapath.is_shadow() && !is_shadow {
            shadow.inherit();
        }
        // A state directory that was lost takes no address from a name that the kernel knows.
        for (name, addresses) in datapath.names() {
            vips.claim(&name, &addresses);
        }
        let served = datapath.served();
        // The first table must not take away what the kernel serves before the source has answered.
        let sources = Sources::spawn(&config, datapath.in_use())?;
        let how = if datapath.is_adopted() { "took over what was attached" } else { "attached" };
        tracing::info!(cgroup = %scope.display(), pool = %config.vip.pool, "{how}");
        // Before the events are read, those of its programs among them.
        datapath.configure_edge(edge::options(&config));
        let (changes_out, changes) = mpsc::channel(ejected::MAX_CHANGES);
        kernel_reports::forward(&mut datapath, sources.demand(), changes_out);
        let trace_events = datapath.take_trace_events();
        let trace_events = trace_events
            .inspect_err(|error| tracing::warn!("connections can't be traced: {error}"))
            .ok();

        let counters = datapath.counters();
        let datapath = Arc::new(SharedDatapath::new(datapath));
        tokio::task::block_in_place(|| datapath.probe_hooks());
        datapath.set_mode(shadow.mode(sources.is_off()));
        let (attached_out, attached) = watch::channel(datapath.hooks().translate);
        let (reloads_out, reloads) = mpsc::channel(MAX_REQUESTS);
        let reload_counts = Arc::<ReloadCounts>::default();
        let (drain_requests_out, drain_requests) = mpsc::channel(MAX_REQUESTS);
        let (edge_vips_out, edge_vips) = watch::channel(config.edge.vips.clone());
        let (tag_out, tag) = watch::channel(config.catalog.tag.clone());
        let (pool_out, pool) = watch::channel(vips.pool_use(SystemTime::now()));
        let mut pipeline = Pipeline::new(Builder::new(&config.vip, vips), recorder);
        pipeline.builder().set_balance(&config.balance);
        pipeline.builder().set_keep(kept_for(&config));
        pipeline.builder().set_edge_vips(config.edge.vips.clone());
        let waits = pipeline.builder().waits().clone();
        waits.lock().contacts.set_served(served);
        let table = pipeline.published();
        let demand = sources.demand().clone();
        let (dns, vip) = (&config.dns, &config.vip);
        let dns = {
            let _guard = servers.enter();
            dns::DnsServer::start(dns_sockets, dns, vip, table.clone(), attached, demand)?
        };
        let tracer = Tracer::start(
            trace_events,
            datapath.clone(),
            counters.clone(),
            pipeline.published(),
            scope.clone(),
            config.admin.trace != TraceAccess::Off,
        );
        let tracer = Arc::new(tracer.context("can't start a thread")?);
        let (problem, deadline_problem) = watch::channel(None);
        let (routes_out, public_routes) = watch::channel(edge::PublicRoutes::default());
        let n_returned = Arc::new(AtomicU64::new(0));
        let ejections_changed = Arc::<tokio::sync::Notify>::default();
        let ejected = ejected::FollowedEjections {
            changes,
            datapath: datapath.clone(),
            counters: counters.clone(),
            n_returned: n_returned.clone(),
            changed: ejections_changed.clone(),
        };
        let (config_out, shown_config) = watch::channel(config.clone());
        let view = Arc::new(DaemonView {
            debug_client: dns.debug_client(),
            dns: api::DnsStatus {
                listen: dns_addresses.clone(),
                listen_tls,
                domain: config.dns.domain.clone(),
                upstreams: Vec::new(),
            },
            dns_stats: dns.stats(),
            scope: scope.clone(),
            datapath: datapath.clone(),
            counters,
            table,
            waits,
            sources: sources.views(),
            demand: sources.demand().clone(),
            tag,
            pool,
            recorder: pipeline.recorder().clone(),
            propagation: pipeline.propagation().clone(),
            at: pipeline.at().subscribe(),
            reloads: reloads_out,
            reload_counts: Arc::clone(&reload_counts),
            drains: drains.view(),
            drain_requests: drain_requests_out,
            tracer: tracer.clone(),
            deadline_problem,
            exposed,
            waiting: admin::waiting(&admin_listeners),
            public_routes,
            edge_vips,
            n_returned,
            config: shown_config,
        });
        for address in admin::exposed(&config.admin.listen) {
            tracing::warn!(
                "admin.listen: who can reach {address} can read what `nohop status` and `nohop \
                 services` show; a firewall, or an address of 127.0.0.0/8, keeps others out"
            );
        }
        let (access_out, access) = watch::channel(tcp_access(&config));
        let mut tasks = Tasks::default();
        let at = pipeline.at().clone();
        let shown = view.clone();
        let revision =
            revision::follow(move || shown.status(), sources.views(), ejections_changed, at);
        tasks.spawn("the revision of the status", revision);
        let serve = admin::serve(admin_listeners, access, view, Handle::current());
        tasks.spawn_on("the admin interface", serve, &servers);
        let routes = unreachable::keep(config.vip.clone(), datapath.clone());
        tasks.spawn("the unreachable routes", routes);
        for address in &dns_addresses {
            tracing::info!("answering *.{} on {address}", config.dns.domain);
        }
        let (deadline_out, deadline) = watch::channel(config.balance.drain_deadline);
        let followed = deadline::Followed {
            table: pipeline.published(),
            drains: drains.subscribe(),
            deadline,
            datapath: datapath.clone(),
            problem,
        };
        tasks.spawn("the deadlines of drains", deadline::follow(followed));
        let followed = edge::FollowedEdge {
            table: pipeline.published(),
            drains: drains.subscribe(),
            datapath: datapath.clone(),
            routes: routes_out,
        };
        tasks.spawn("the routes of public VIPs", edge::follow(followed));
        tasks.spawn("the probes of ejected backends", ejected::follow(ejected));
        let (network_out, network) = watch::channel(None);
        tasks.spawn("this host's interfaces", network::follow(network_out));
        tasks.spawn("the probe of the unit names", names::probe(datapath.clone()));
        let resolver = Resolver::start(&config.dns.domain).await;
        pipeline.builder().set_hosts(resolver.hosts());
        pipeline.builder().set_drains(drains.drains());
        Ok(Daemon {
            config,
            sources,
            resolver,
            waits: pipeline.builder().waits().clone(),
            prober: BackendProber::default(),
            pipeline,
            datapath,
            dns,
            servers,
            shadow,
            off_file,
            notify: Notify::of_environment(),
            read,
            reloads,
            reload_counts,
            reading: None,
            drains,
            drain_deadline: deadline_out,
            drain_requests,
            finding: JoinSet::new(),
            tag: tag_out,
            edge_vips: edge_vips_out,
            pool: pool_out,
            attached: attached_out,
            tcp_access: access_out,
            shown_config: config_out,
            tracer,
            dns_listen: dns_addresses,
            network,
            tasks,
            scope,
            state_lock,
        })
    }
}

/// The cgroup whose processes are served.
fn scope(config: &Config) -> anyhow::Result<PathBuf> {
    let scope = match &config.cgroup {
        Some(scope) => scope.clone(),
        None => cgroup::default_scope()?,
    };
    // Before anything else is touched.
    cgroup::inspect(&scope)?;
    cgroup::check_exclusions(&config.datapath.exclude_cgroups)?;
    Ok(scope)
}
