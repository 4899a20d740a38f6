#!/bin/sh
# dpkg: `remove`, or `upgrade`; rpm: the number of versions that stay.
set -e

case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac

if grep -qsE '^nameserver (127\.0\.0\.1|169\.254\.53\.53)$' /etc/resolv.conf; then
    echo "nohop: /etc/resolv.conf may name nohop alone; undo \`nohop dns setup\`, or no name is found from now on" >&2
fi
if [ -e /etc/systemd/resolved.conf.d/nohop.conf ]; then
    echo "nohop: /etc/systemd/resolved.conf.d/nohop.conf sends queries to nohop; remove it, then: systemctl restart systemd-resolved" >&2
fi
if [ -d /run/systemd/system ]; then
    # The socket too: a query would start the daemon again.
    systemctl disable --now nohop.socket nohop.service || true
fi
# The programs serve without a daemon, so they would outlive the package: connections to VIPs end here.
rm -f /var/lib/nohop/nohop
unload() {
    /usr/bin/nohop unload --all && return
    # With mistakes in the configuration, what lies where the defaults are; not after another failure, such as a
    # daemon that runs.
    [ $? -eq 2 ] && /usr/bin/nohop unload --all --config /dev/null
}
if ! unload; then
    # A daemon from another path uses them. What removes them later has to outlive the package.
    mkdir -p /var/lib/nohop
    cp /usr/bin/nohop /var/lib/nohop/nohop
fi
