#!/bin/sh
# dpkg: `remove`, `purge`, `upgrade`...; rpm: the number of versions that stay.
set -e

if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi
if [ "$1" = purge ]; then
    rm -rf /var/lib/nohop
    rm -f /etc/nohop/nohop.toml /etc/nohop/nohop.toml.old
    rmdir /etc/nohop 2>/dev/null || true
fi
