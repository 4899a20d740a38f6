//! The plane: the kernel side, kept in step with the table.
