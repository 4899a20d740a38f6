//! What the unit `edge` reports: flows one by one while a client traces, and ejections.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use lb_userspace::datapath::{Datapath, EdgeFlowState, FlowStep, Report, TraceEvents, TracedFlow};

use crate::edge::{
    BACKEND, CLIENT, LONG, Network, PORT, PUBLIC, SOURCE, apply, ask, count, flows, place, public,
    request, serve, start_server, stop_server, web,
};
use crate::edge_room::{bound_stream, reset};
use crate::netns::inside;

/// The next things that happened to flows, as many as these.
fn next(events: &mut TraceEvents, n: usize) -> Vec<TracedFlow> {
    let (start, mut all) = (Instant::now(), Vec::new());
    while all.len() < n {
        events.read_flows(100, |flow| all.push(flow));
        assert!(start.elapsed() < LONG, "{all:#?}");
        std::thread::yield_now();
    }
    assert_eq!(all.len(), n, "{all:#?}");
    all
}

fn trace(datapath: &Datapath) {
    datapath.set_trace(Some((Duration::from_secs(600), u32::MAX)));
}

/// Flows that begin, are refused and end, of both families and protocols; nothing while nothing is traced.
pub fn flows_are_traced() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let other_vip = SocketAddr::from(([203, 0, 113, 11], 80));
        let other = public("other", &[(BACKEND, PORT + 1).into()], &[other_vip]);
        let mut datapath = serve(&place, vec![web(), other]);
        let mut events = datapath.take_trace_events().unwrap();
        start_server(&network.backend, BACKEND.into(), 'A');
        start_server(&network.backend, "fd07::2".parse().unwrap(), 'A');
        let vip = SocketAddr::from((PUBLIC, 80));
        let vip6: SocketAddr = "[fd99::10]:80".parse().unwrap();
        network.client.run(move || request(vip, b"before").unwrap());
        trace(&datapath);

        for vip in [vip, vip6] {
            network.client.run(move || request(vip, b"?").unwrap());
            let both = next(&mut events, 2);
            let [begun, ended] = &both[..] else { unreachable!() };
            assert_eq!((begun.step, begun.reason), (FlowStep::Begun, "the only backend"));
            assert_eq!(begun.state, Some(EdgeFlowState::SynSent));
            assert_eq!((ended.step, ended.reason), (FlowStep::Ended, "closed"));
            assert_eq!(ended.state, Some(EdgeFlowState::Closed));
            assert!(
                ended.packets >= 6 && ended.bytes > 6 * 40 && ended.bytes < 10_000,
                "{ended:?}"
            );
            for flow in [begun, ended] {
                assert_eq!(
                    (flow.service.as_deref(), flow.vip, flow.protocol),
                    (Some("web"), vip, 6)
                );
                let (backend, source) = flow.backend.unwrap();
                assert_eq!((backend.port(), backend.is_ipv6()), (PORT, vip.is_ipv6()));
                assert_eq!(source.is_ipv6(), vip.is_ipv6());
                assert_eq!(flow.client, begun.client);
                assert_eq!(flow.cookie, begun.cookie);
            }
        }

        // Of UDP the daemon ends it, as of what isn't closed.
        network.client.run(move || ask(CLIENT.into(), vip, b"?").unwrap());
        let stream = network.client.run(move || TcpStream::connect_timeout(&vip, LONG).unwrap());
        let begun = next(&mut events, 2);
        assert!(begun.iter().all(|flow| flow.step == FlowStep::Begun), "{begun:#?}");
        datapath.sweep_edge_after(Duration::from_secs(7_200));
        let mut ended = next(&mut events, 2);
        ended.sort_by_key(|flow| flow.protocol);
        let states = ended.iter().map(|flow| (flow.reason, flow.state)).collect::<Vec<_>>();
        let (established, udp) = (Some(EdgeFlowState::Established), Some(EdgeFlowState::Udp));
        assert_eq!(states, [("timed out", established), ("timed out", udp)]);

        // Its next packet is of no flow; nor does any service have this port.
        network.client.run(move || {
            let mut stream = stream;
            stream.write_all(b"more").unwrap();
            stream.read(&mut [0]).unwrap_err();
        });
        let other = SocketAddr::from((PUBLIC, 81));
        network.client.run(move || {
            let socket = std::net::UdpSocket::bind((CLIENT, 0)).unwrap();
            socket.send_to(b"?", other).unwrap();
        });
        let refused = next(&mut events, 2);
        let shown = |flow: &TracedFlow| (flow.step, flow.reason, flow.vip, flow.backend);
        assert_eq!(
            [shown(&refused[0]), shown(&refused[1])],
            [
                (FlowStep::Refused, "a packet of no known flow", vip, None),
                (FlowStep::Refused, "no service has this address and port", other, None),
            ]
        );
        assert_eq!(refused[1].service, None);

        stop_server(&network.backend, BACKEND.into());
        stop_server(&network.backend, "fd07::2".parse().unwrap());
        let listener = network.backend.run(|| TcpListener::bind((BACKEND, PORT + 1)).unwrap());
        network.client.run(move || reset(bound_stream((CLIENT, 7_008), other_vip)));
        let reset = next(&mut events, 2).remove(1);
        assert_eq!((reset.step, reset.reason), (FlowStep::Ended, "reset by the client"));
        drop(listener);
        network.client.run(move || TcpStream::connect_timeout(&other_vip, LONG).unwrap_err());
        let refused = next(&mut events, 2).remove(1);
        assert_eq!((refused.step, refused.reason), (FlowStep::Ended, "refused by the backend"));

        datapath.set_trace(None);
        network.client.run(move || TcpStream::connect_timeout(&other_vip, LONG).unwrap_err());
        events.read_flows(100, |flow| panic!("{flow:?}"));
    });
}

/// A backend that is ejected by what flows through the edge show is reported at once, as one by sockets is.
pub fn ejections_are_reported() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let mut datapath = serve(&place, vec![]);
        let mut reports = datapath.take_reports().unwrap();
        let vip = SocketAddr::from((PUBLIC, 80));
        // Nothing listens there.
        let dead = SocketAddr::from((BACKEND, PORT));
        apply(&mut datapath, vec![public("web", &[dead], &[vip])]);
        let (start, mut report) = (Instant::now(), None);
        while report.is_none() {
            network.client.run(move || TcpStream::connect_timeout(&vip, LONG).unwrap_err());
            report = reports.next_report();
            assert!(start.elapsed() < LONG, "{:?}", datapath.edge_counts());
        }
        let Some(Report::Ejection { service, backend, ejected }) = report else {
            panic!("{report:?}");
        };
        assert_eq!((&*service, backend.address), ("web", dead));
        assert!(ejected.is_some());
        let indices = datapath.indices("web").unwrap();
        assert_eq!(datapath.counters().service(indices.service).ejections, 1);
    });
}

/// No route to a backend isn't the same as a backend on the edge: no packet gets to the host's own servers, and it is
/// counted.
pub fn no_route() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vip = SocketAddr::from((PUBLIC, 80));
        let nowhere = SocketAddr::from(([192, 0, 2, 7], PORT));
        let datapath = serve(&place, vec![public("web", &[nowhere], &[vip])]);
        network.client.run(move || {
            let socket = std::net::UdpSocket::bind((CLIENT, 0)).unwrap();
            socket.send_to(b"?", vip).unwrap();
        });
        let start = Instant::now();
        while count(&datapath, "no_route") == 0 {
            assert!(start.elapsed() < LONG, "{:?}", datapath.edge_counts());
            std::thread::yield_now();
        }
        let flows = flows(&datapath);
        // A backend on the edge would see the client's address.
        assert_eq!(flows.iter().map(|flow| flow.source.ip()).collect::<Vec<_>>(), [SOURCE]);
        assert_eq!(count(&datapath, "forwarded"), 0);
    });
}
