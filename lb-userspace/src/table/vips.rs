//! VIPs: which address a name has on this node.
