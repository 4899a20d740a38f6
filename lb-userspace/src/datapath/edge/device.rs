//! What the kernel reports of network interfaces that matters to XDP: by rtnetlink(7), and from Linux 6.3 on by
//! the generic netlink family `netdev` (Documentation/netlink/specs/netdev.yaml).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::net::netlink;

use super::super::bpf::XDP_FLAGS_DRV_MODE;
use super::super::netlink::{NLM_F_ACK, NLM_F_DUMP, Netlink, attribute, find_attribute, malformed};

const RTM_NEWLINK: u16 = libc::RTM_NEWLINK;
/// struct ifinfomsg
const IFINFOMSG_SIZE: usize = 16;
const IFLA_ADDRESS: u16 = libc::IFLA_ADDRESS;
const IFLA_IFNAME: u16 = libc::IFLA_IFNAME;
const IFLA_LINK: u16 = libc::IFLA_LINK;
const IFLA_LINKINFO: u16 = libc::IFLA_LINKINFO;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_XDP: u16 = libc::IFLA_XDP;
const IFLA_XDP_FD: u16 = 1;
const IFLA_XDP_FLAGS: u16 = 3;
const IFLA_XDP_PROG_ID: u16 = 4;
const XDP_FLAGS_UPDATE_IF_NOEXIST: u32 = 1;

/// The controller of generic netlink (linux/genetlink.h), and its request for a family's number.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// struct genlmsghdr
const GENLMSGHDR_SIZE: usize = 4;
/// linux/netdev.h
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_XDP_ACT_BASIC: u64 = 1;
const NETDEV_XDP_ACT_REDIRECT: u64 = 2;
const NETDEV_XDP_ACT_NDO_XMIT: u64 = 4;

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its hardware address; zero where that has another length than Ethernet's.
    pub mac: [u8; 6],
    /// What it is, such as `veth`; empty for hardware.
    pub kind: String,
    /// The id of the XDP program that is attached to it.
    pub program: Option<u32>,
    /// The interface that it is built upon.
    pub lower: Option<u32>,
    /// What its driver does with XDP, NETDEV_XDP_ACT_*; `None` where the kernel doesn't report it.
    pub xdp_features: Option<u64>,
}

impl Device {
    /// Whether a program may send packets back by it (XDP_TX). A veth loses them where its other end has GRO, but no
    /// program of its own: it gives them over and doesn't wake it (`veth_xdp_flush`). Redirected ones arrive.
    pub fn sends_back(&self) -> bool {
        self.kind != "veth"
    }

    /// Whether it takes packets that are redirected to it. A veth gives them to its other end, which has to have
    /// NAPI on, by a program of its own or by GRO; the kernel reports that here (`veth_set_xdp_features`). Where it
    /// doesn't report anything nobody knows: not every driver with XDP can.
    pub fn takes_redirected(&self) -> bool {
        self.does(NETDEV_XDP_ACT_NDO_XMIT)
    }

    /// Whether its driver runs XDP programs; `None` where the kernel doesn't report it.
    pub fn runs_xdp(&self) -> Option<bool> {
        self.xdp_features.map(|features| features & NETDEV_XDP_ACT_BASIC != 0)
    }

    /// Whether a program on it may redirect packets to other interfaces.
    pub fn redirects(&self) -> bool {
        self.does(NETDEV_XDP_ACT_REDIRECT)
    }

    fn does(&self, feature: u64) -> bool {
        self.xdp_features.is_some_and(|features| features & feature != 0)
    }
}

/// A VLAN device on an interface.
pub fn vlan_of(index: u32, devices: &BTreeMap<u32, Device>) -> Option<(&str, u32)> {
    let mut devices = devices.iter();
    let found = devices.find(|(_, device)| device.kind == "vlan" && device.lower == Some(index));
    found.map(|(index, device)| (device.name.as_str(), *index))
}

/// The interfaces of this network namespace, by their indices.
///
/// # Errors
/// When the kernel refuses.
pub fn all() -> io::Result<BTreeMap<u32, Device>> {
    const RTEXT_FILTER_SKIP_STATS: u32 = 8;
    const IFLA_EXT_MASK: u16 = libc::IFLA_EXT_MASK;
    let mut devices = BTreeMap::new();
    let mut socket = Netlink::open(None)?;
    let mask = attribute(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    let request = [&[0; IFINFOMSG_SIZE][..], &mask].concat();
    socket.send(libc::RTM_GETLINK, NLM_F_DUMP, &request)?;
    socket.receive(|message| {
        if message.kind == RTM_NEWLINK {
            let (index, device) = parse(message.payload)?;
            devices.insert(index, device);
        }
        Ok(())
    })?;
    // Before 6.3 there is no such family.
    if let Ok(features) = xdp_features() {
        for (index, device) in &mut devices {
            device.xdp_features = features.get(index).copied();
        }
    }
    Ok(devices)
}

fn parse(payload: &[u8]) -> io::Result<(u32, Device)> {
    let head: &[u8; IFINFOMSG_SIZE] = payload.first_chunk().ok_or_else(malformed)?;
    let index = number(&head[4..8]).ok_or_else(malformed)?;
    let attributes = &payload[IFINFOMSG_SIZE..];
    let find = |kind| find_attribute(attributes, kind);
    let nested = |outer: u16, inner: u16| -> io::Result<Option<&[u8]>> {
        find(outer)?.map_or(Ok(None), |value| find_attribute(value, inner))
    };
    let device = Device {
        name: find(IFLA_IFNAME)?.map(text).unwrap_or_default(),
        mac: find(IFLA_ADDRESS)?.and_then(|mac| mac.try_into().ok()).unwrap_or_default(),
        kind: nested(IFLA_LINKINFO, IFLA_INFO_KIND)?.map(text).unwrap_or_default(),
        program: nested(IFLA_XDP, IFLA_XDP_PROG_ID)?.and_then(number).filter(|id| *id != 0),
        lower: find(IFLA_LINK)?.and_then(number),
        xdp_features: None,
    };
    Ok((index, device))
}

/// What drivers do with XDP, by the interfaces' indices.
fn xdp_features() -> io::Result<BTreeMap<u32, u64>> {
    let mut socket = Netlink::open(Some(netlink::GENERIC))?;
    let header = |command: u8| [command, 1, 0, 0];
    let name = attribute(CTRL_ATTR_FAMILY_NAME, b"netdev\0");
    let request = [&header(CTRL_CMD_GETFAMILY)[..], &name, &[0]].concat();
    socket.send(GENL_ID_CTRL, NLM_F_ACK, &request)?;
    let mut family = None;
    socket.receive(|message| {
        let attributes = message.payload.get(GENLMSGHDR_SIZE..).ok_or_else(malformed)?;
        let found = find_attribute(attributes, CTRL_ATTR_FAMILY_ID)?;
        family = found.and_then(|id| id.try_into().ok()).map(u16::from_ne_bytes);
        Ok(())
    })?;
    let family = family.ok_or_else(malformed)?;
    let mut features = BTreeMap::new();
    socket.send(family, NLM_F_DUMP, &header(NETDEV_CMD_DEV_GET))?;
    socket.receive(|message| {
        let attributes = message.payload.get(GENLMSGHDR_SIZE..).ok_or_else(malformed)?;
        let index = find_attribute(attributes, NETDEV_A_DEV_IFINDEX)?.and_then(number);
        let found = find_attribute(attributes, NETDEV_A_DEV_XDP_FEATURES)?;
        let found = found.and_then(|value| value.try_into().ok()).map(u64::from_ne_bytes);
        features.extend(index.zip(found));
        Ok(())
    })?;
    Ok(features)
}

/// Why a driver refuses a program. The system call has a number alone; rtnetlink has the driver's words, to the same
/// request.
pub fn reason(program: BorrowedFd<'_>, index: u32, error: io::Error) -> String {
    let words = ask(program, index);
    words.unwrap_or_else(|| match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "its driver runs no XDP programs".to_owned(),
        _ => format!("its driver refuses the XDP program: {error}"),
    })
}

fn ask(program: BorrowedFd<'_>, index: u32) -> Option<String> {
    let mut socket = Netlink::open(None).and_then(Netlink::with_reasons).ok()?;
    let mut set = |fd: i32, flags: u32| -> io::Result<()> {
        let fd = attribute(IFLA_XDP_FD, &fd.to_ne_bytes());
        let flags = attribute(IFLA_XDP_FLAGS, &flags.to_ne_bytes());
        let mut head = [0; IFINFOMSG_SIZE];
        head[4..8].copy_from_slice(&index.to_ne_bytes());
        let request = [&head[..], &attribute(IFLA_XDP, &[fd, flags].concat())].concat();
        socket.send(libc::RTM_SETLINK, NLM_F_ACK, &request)?;
        socket.receive(|_| Ok(()))
    };
    match set(program.as_raw_fd(), XDP_FLAGS_DRV_MODE | XDP_FLAGS_UPDATE_IF_NOEXIST) {
        // It does by now: by a link, the next time.
        Ok(()) => {
            if let Err(error) = set(-1, XDP_FLAGS_DRV_MODE) {
                tracing::warn!("the XDP program can't be detached from interface {index}: {error}");
            }
            None
        }
        Err(error) if error.raw_os_error().is_none() => Some(error.to_string()),
        Err(_) => None,
    }
}

fn number(octets: &[u8]) -> Option<u32> {
    octets.try_into().ok().map(u32::from_ne_bytes)
}

fn text(octets: &[u8]) -> String {
    let octets = octets.split(|&octet| octet == 0).next().unwrap_or_default();
    String::from_utf8_lossy(octets).into_owned()
}
