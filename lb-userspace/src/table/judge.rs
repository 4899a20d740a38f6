//! What can be routed to: one instance in, one verdict out.
