#!/bin/sh
# dpkg: `configure`, and the former version at an upgrade; rpm: the number of versions that are then installed.
set -e

config=/etc/nohop/nohop.toml

is_upgrade() {
    case "$1" in
    configure) [ -n "$2" ] ;;
    2) true ;;
    *) false ;;
    esac
}

# The unpacked one, whatever is on PATH.
nohop=/usr/bin/nohop

if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi

# What was installed by hand comes before the package's own files.
for other in /etc/systemd/system/nohop.service /etc/systemd/system/nohop.socket; do
    if [ -f "$other" ] && [ ! -L "$other" ]; then
        echo "nohop: $other comes before the package's unit; remove it, then: systemctl daemon-reload" >&2
    fi
done
if [ -x /usr/local/bin/nohop ]; then
    echo "nohop: /usr/local/bin/nohop comes before /usr/bin/nohop on PATH; remove it once nothing runs it" >&2
fi

if is_upgrade "$@"; then
    if [ -f "$config" ] && ! $nohop config migrate "$config" --apply; then
        echo "nohop: $config has mistakes; the running daemon isn't restarted. Mend it, then: systemctl restart nohop" >&2
        exit 0
    fi
    # The kernel keeps serving meanwhile, and the socket keeps queries.
    if [ -d /run/systemd/system ]; then
        systemctl try-restart nohop.service || true
    fi
    exit 0
fi

cat <<'END'
nohop is installed and does nothing yet. See what it would need and do:
    nohop check
    nohop run --shadow
then start it:
    systemctl enable --now nohop.socket nohop.service
END
