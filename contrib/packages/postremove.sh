#!/bin/sh
# dpkg: `remove`, `purge`, `upgrade`...; rpm: the number of versions that stay.
set -e

if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi
case "$1" in
remove | 0)
    if [ -e /var/lib/nohop/nohop ]; then
        cat >&2 <<'END'
nohop: the programs in the kernel are still attached, and connections to VIPs still work, since a nohop daemon
runs from another path or the kernel refused (see above). Stop that daemon, then
    run: /var/lib/nohop/nohop unload --all && rm /var/lib/nohop/nohop
END
    fi
    ;;
esac
if [ "$1" = purge ]; then
    # Without the copy that removes them the programs would stay until the next boot.
    if [ -e /var/lib/nohop/nohop ]; then
        find /var/lib/nohop -mindepth 1 ! -name nohop -delete
    else
        rm -rf /var/lib/nohop
    fi
    rm -f /etc/nohop/nohop.toml /etc/nohop/nohop.toml.old /etc/nohop/nohop.toml.old.*
    rmdir /etc/nohop 2>/dev/null || true
fi
