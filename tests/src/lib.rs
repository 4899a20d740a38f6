//! A cluster on one machine: network namespaces as hosts, cgroups as scopes, a real Consul.
