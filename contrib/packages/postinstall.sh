#!/bin/sh
# dpkg: `configure`, and the former version at an upgrade; rpm: the number of versions that are then installed.
set -e

case "$1" in
configure | [0-9]*) ;;
abort-remove)
    echo "nohop: the removal was aborted; start it again: systemctl enable --now nohop.socket nohop.service" >&2
    exit 0
    ;;
*) exit 0 ;;
esac

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

# What was installed by hand overrides the package's own files.
for other in /etc/systemd/system/nohop.service /etc/systemd/system/nohop.socket; do
    if [ -f "$other" ] && [ ! -L "$other" ]; then
        echo "nohop: $other overrides the package's unit; remove it, then: systemctl daemon-reload" >&2
    fi
done
if [ -x /usr/local/bin/nohop ]; then
    echo "nohop: /usr/local/bin/nohop overrides /usr/bin/nohop on PATH; remove it once nothing runs it" >&2
fi

for exe in /proc/[0-9]*/exe; do
    path=$(readlink "$exe" 2>/dev/null) || continue
    pid=${exe#/proc/}
    pid=${pid%/exe}
    case "$path" in
    "$nohop" | "$nohop (deleted)") continue ;;
    */nohop | */nohop' (deleted)') ;;
    *) continue ;;
    esac
    # Not a client of it, such as `nohop top`.
    if tr '\0' ' ' < "/proc/$pid/cmdline" | grep -q ' run '; then
        echo "nohop: process $pid runs $path; nohop.service doesn't start beside it: stop it first" >&2
    fi
done

# No conffile: dpkg would ask about it whenever a version has a new key.
if [ ! -e "$config" ] && [ ! -L "$config" ]; then
    install -d -m 755 /etc/nohop
    install -m 644 /usr/share/nohop/nohop.toml "$config"
fi

if is_upgrade "$@"; then
    if [ -f "$config" ] && ! $nohop config migrate "$config" --apply; then
        echo "nohop: $config has mistakes; the running daemon isn't restarted. Fix it, then: systemctl restart nohop" >&2
        exit 0
    fi
    # The kernel keeps serving meanwhile, and the socket keeps queries.
    if [ -d /run/systemd/system ]; then
        systemctl try-restart nohop.service || true
    fi
    # dpkg names the former version after a removal, too, which disabled the units.
    if [ ! -d /run/systemd/system ] || systemctl is-enabled --quiet nohop.service || systemctl is-active --quiet nohop.service; then
        exit 0
    fi
fi

cat <<'END'
nohop is installed and does nothing yet. See what it would need and do:
    nohop check
    nohop run --shadow
then start it:
    systemctl enable --now nohop.socket nohop.service
END
