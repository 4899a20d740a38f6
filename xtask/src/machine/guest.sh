#!/bin/bash
# What is tried on the machine, by systemd's unit nohop-machine.service once it is up: `guest.sh OLD NEW`, the
# versions of the packages in /packages, of which OLD was installed into the image, with its units enabled.
# Writes a line for each check to /dev/ttyS1, and the journal to /dev/ttyS2.
old=$1 new=$2
exec < /dev/null > /dev/ttyS1 2>&1
stty -F /dev/ttyS1 raw -echo
export DEBIAN_FRONTEND=noninteractive PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
cd /packages || exit 1
# As it grows, so that a machine that is ended leaves it as well.
journalctl --no-pager -o short-monotonic -n all -f > /dev/ttyS2 &
url=http://helloworld.service/

pass() { echo "machine: PASS $1"; }
fail() { echo "machine: FAIL $1: $(tr '\n' ' ' <<< "$2" | tail -c 600)"; }
# Also from a check, whose output is a reason.
note() { echo "machine: NOTE $1" > /dev/ttyS1; }

# check NAME FUNCTION: what the function prints is the reason of a failure.
check() {
    local output
    if output=$($2 2>&1); then pass "$1"; else fail "$1" "$output"; fi
}

# Runs a command of the README's installation, as it stands there.
readme() { sh -c "$1"; }

show() { systemctl show -P "$2" "$1"; }
curls() { curl -sS --max-time 20 $url; }
is_answered() { curls | grep -q '^hello from hello-[ab]$'; }
ready() { nohop status --wait-ready --timeout 240 > /dev/null; }
# The entries from a time on. After a cursor, systemd 252 leaves out the first one that matches.
since() { date +@%s.%6N; }
journal() { journalctl --sync; journalctl -q --no-pager -o cat --since "$1" "${@:2}"; }

# until SECONDS COMMAND...: whether the command succeeds in time.
until_() {
    local end=$((SECONDS + $1))
    shift
    until "$@" > /dev/null 2>&1; do
        [ $SECONDS -lt $end ] || { echo "$* didn't succeed in time"; return 1; }
        sleep 0.2
    done
}

# Counts in FILE what COMMAND does until there is no /run/load: how often, and how often unsuccessfully.
repeat() {
    local n=0 lost=0 file=$1
    shift
    while [ -e /run/load ]; do
        n=$((n + 1))
        "$@" > /dev/null 2>&1 || lost=$((lost + 1))
        # The machine has one slow processor, which the daemon's start needs.
        sleep 1
    done
    echo "$n $lost" > "$file"
}
connects() { curl -s --max-time 20 "http://$address/" | grep -q '^hello from hello-[ab]$'; }
looks_up() { dig +short +tries=1 +timeout=20 helloworld.service | grep -qFx "$address"; }

# under_load COMMAND: no connection, by the VIP, and no lookup fails meanwhile.
under_load() {
    local address n lost
    address=$(getent ahostsv4 helloworld.service | awk 'NR == 1 { print $1 }')
    [ -n "$address" ] || { echo "helloworld.service has no address"; return 1; }
    rm -f /run/load-*
    touch /run/load
    repeat /run/load-1 connects &
    repeat /run/load-2 looks_up &
    sleep 2
    "$@" || { echo "$* failed"; rm /run/load; wait; return 1; }
    sleep 2
    rm /run/load
    wait
    read -r n lost < /run/load-1
    note "$* under load: connections $n, lost $lost; lookups and lost: $(cat /run/load-2)"
    [ "$lost" = 0 ] && [ "$n" -gt 5 ] && grep -q ' 0$' /run/load-2
}

# --- after a cold boot, of an image with the units enabled

init() { [ "$(ps -p 1 -o comm=)" = systemd ]; }
note "$(ps -p 1 -o pid,user,comm,args | tr '\n' '|')"
note "$(uname -sr), $(systemctl --version | head -1)"
check "systemd is PID 1" init
starts() { ready || { systemctl status nohop --no-pager; nohop status; return 1; }; }
check "nohop is ready after a cold boot" starts
check "curl by name" is_answered
is_serving() { [ "$(show nohop.service ActiveState) $(show nohop.socket ActiveState)" = "active active" ]; }
check "service and socket are active" is_serving
# RestartSteps and RestartMaxDelaySec are of systemd 254.
accepted() {
    local complaints
    complaints=$(journalctl -b -q --no-pager -o cat _PID=1 | grep 'nohop\.\(service\|socket\)' |
        grep ' failed\|, ignoring' | grep -v "'Restart\(Steps\|MaxDelaySec\)'")
    [ -z "$complaints" ] || { echo "$complaints"; return 1; }
}
check "systemd accepts each setting of the units" accepted

# The stand-ins of Nomad and Docker are what starts at boot without knowing of nohop.
is_ordered() {
    local up unit
    up=$(show nohop.service ActiveEnterTimestampMonotonic)
    [ "$up" -gt 0 ] || return 1
    for unit in nomad docker; do
        [ "$(show $unit.service InactiveExitTimestampMonotonic)" -ge "$up" ] || { echo "$unit.service started first"; return 1; }
    done
    [ "$(show nohop.socket ActiveEnterTimestampMonotonic)" -le "$up" ]
}
check "nohop starts before Nomad and Docker, after its socket" is_ordered

exposure() {
    local level
    level=$(systemd-analyze security --no-pager nohop.service | sed -n 's/.*Overall exposure level for nohop.service: \([0-9.]*\).*/\1/p')
    note "systemd-analyze security: $level (limit $1)"
    awk -v level="$level" -v limit="$1" 'BEGIN { exit !(level != "" && level <= limit) }'
}
hardened() { exposure 3.9; }
check "systemd-analyze security is at most 3.9" hardened

# Of systemd's mount, and of the pins on it.
private_pins() {
    # systemd mounts it with the sticky bit.
    local modes
    modes=$(stat -c '%U %a' /sys/fs/bpf /sys/fs/bpf/nohop | sed 's/ 1700/ 700/' | tr '\n' ' ')
    [ "$modes" = "root 700 root 700 " ] || { echo "$modes"; return 1; }
}
check "bpffs and the pins are root's, 0700" private_pins

threads() {
    local task name permitted effective
    for task in /proc/"$(show nohop.service MainPID)"/task/*; do
        read -r name < "$task/comm" || continue
        permitted=$(awk '/^CapPrm/ { print $2 }' "$task/status")
        effective=$(awk '/^CapEff/ { print $2 }' "$task/status")
        case $name in
        # No CAP_SYS_ADMIN (21) or CAP_SYS_PTRACE (19) in effect; CAP_NET_BIND_SERVICE (10) is gone.
        nohop | trace) [ "$effective $permitted" = "000000c000001006 000000c000281006" ] ;;
        dns | server | log | events | bpf-log) [ "$permitted" = 0000000000000000 ] ;;
        catalog | recorder | off-file) [ "$permitted" = 0000000000000006 ] ;;
        *) true ;;
        esac || { echo "thread $name: CapEff $effective CapPrm $permitted"; return 1; }
    done
}
check "threads have the capabilities that docs/security.md lists" threads
has_limits() {
    local limits
    note "memory of nohop.service: $(show nohop.service MemoryCurrent) bytes"
    limits=$(nohop status --json | tr -d '\n' | grep -o '"limits": *\[[^]]*]')
    # Emulated, the process that creates the maps may take too long for the daemon.
    case $limits in
    '"limits": []' | *'hung for'*) note "status: $limits" ;;
    *) echo "$limits"; return 1 ;;
    esac
}
check "nothing that the unit forbids limits the datapath" has_limits

# --- restarts

restart() { systemctl restart nohop.service && ready; }
check "systemctl restart under load loses nothing" "under_load restart"
killed() {
    local pid
    pid=$(show nohop.service MainPID)
    systemctl kill --kill-whom=main --signal=KILL nohop.service
    until_ 120 another_than "$pid" && ready
}
another_than() { local pid; pid=$(show nohop.service MainPID); [ "$pid" != 0 ] && [ "$pid" != "$1" ]; }
check "kill -9 under load loses nothing" "under_load killed"
hangs() {
    local pid start
    pid=$(show nohop.service MainPID)
    start=$(since)
    [ "$(show nohop.service WatchdogUSec)" = 30s ] || return 1
    kill -STOP "$pid"
    # The kernel answers and connects meanwhile.
    is_answered || { kill -CONT "$pid"; return 1; }
    until_ 150 another_than "$pid" && ready || return 1
    journal "$start" _PID=1 | grep -q 'nohop.service: Watchdog timeout'
}
check "a daemon that hangs is started again by the watchdog" hangs

# --- reload

reload() { systemctl reload nohop.service; }
check "systemctl reload" reload
reload_broken() {
    local start status
    start=$(since)
    cp /etc/nohop/nohop.toml /run/nohop.toml
    sed -i '/^\[dns\]$/a ttl = "soon"' /etc/nohop/nohop.toml
    systemctl reload nohop.service
    status=$?
    cp /run/nohop.toml /etc/nohop/nohop.toml
    [ $status -ne 0 ] || { echo "it succeeded"; return 1; }
    journal "$start" -u nohop.service | grep -q 'dns.ttl' || { journal "$start" -u nohop.service; return 1; }
    is_serving && is_answered
}
check "systemctl reload with a broken file fails, and the journal has the reason" reload_broken
start_broken() {
    local pid
    printf 'nonsense = 1\n' > /etc/nohop/nohop.toml
    systemctl stop nohop.socket nohop.service
    systemctl start nohop.service 2> /dev/null
    until_ 120 is_failed || return 1
    sleep 3
    # Only a lookup that the kernel doesn't answer would start it again.
    is_failed || { echo "it was started again"; return 1; }
    is_answered || return 1
    cp /run/nohop.toml /etc/nohop/nohop.toml
    systemctl restart nohop.socket nohop.service && ready
}
is_failed() { [ "$(show nohop.service ActiveState) $(show nohop.service ExecMainStatus)" = "failed 2" ]; }
check "a configuration with mistakes isn't retried" start_broken

# --- less privileges

with_less() {
    mkdir -p /etc/systemd/system/nohop.service.d
    cp /usr/share/doc/nohop/examples/no-udp-aborts.conf /etc/systemd/system/nohop.service.d/
    systemctl daemon-reload
    exposure 3.2 && systemctl restart nohop.service && ready && is_answered
    local status=$?
    rm /etc/systemd/system/nohop.service.d/no-udp-aborts.conf
    systemctl daemon-reload
    systemctl restart nohop.service && ready && return $status
}
check "with no-udp-aborts.conf at most 3.2, and it serves" with_less

# --- memory: where the daemon can't enter the root memory cgroup, as in a container, maps are its own

charged() {
    local dropin=/run/systemd/system/nohop.service.d status
    systemctl stop nohop.socket nohop.service && nohop unload --all || return 1
    mkdir -p $dropin
    printf '[Service]\nReadOnlyPaths=/sys/fs/cgroup/cgroup.procs\n' > $dropin/charged.conf
    systemctl daemon-reload
    systemctl start nohop.socket nohop.service && ready
    status=$?
    nohop status --json | grep -q "charged to this daemon's memory cgroup" || status=1
    note "memory of nohop.service with the maps: $(show nohop.service MemoryCurrent) bytes"
    rm $dropin/charged.conf
    systemctl daemon-reload
    systemctl stop nohop.socket nohop.service && nohop unload --all && systemctl start nohop.socket nohop.service && ready || return 1
    note "memory of nohop.service without the maps: $(show nohop.service MemoryCurrent) bytes"
    return $status
}
check "maps that have to be charged to the daemon are reported" charged

# --- systemd-resolved

through_resolved() {
    systemctl start systemd-resolved.service || return 1
    ln -sf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
    # As DHCP would; nothing answers there.
    resolvectl dns eth0 10.9.0.53 && resolvectl domain eth0 '~.' || return 1
    nohop dns setup --systemd-resolved --apply || return 1
    resolvectl query helloworld.service && is_answered
}
check "dns setup --systemd-resolved --apply on a live systemd-resolved" through_resolved
undone() {
    nohop dns setup --systemd-resolved --undo || return 1
    [ ! -e /etc/systemd/resolved.conf.d/nohop.conf ] || return 1
    ! timeout 60 resolvectl query helloworld.service
}
check "dns setup --systemd-resolved --undo" undone
systemctl stop systemd-resolved.service
rm -f /etc/resolv.conf
echo 'nameserver 127.0.0.1' > /etc/resolv.conf

# --- packages

upgrade() {
    local pid
    pid=$(show nohop.service MainPID)
    dpkg -i "nohop_${new}_amd64.deb" > /run/upgrade.log 2>&1 || { cat /run/upgrade.log; return 1; }
    another_than "$pid" || { echo "it wasn't restarted"; cat /run/upgrade.log; return 1; }
    ready && [ "$(dpkg-query -W -f '${Version}' nohop)" = "$new" ]
}
[ "$(dpkg-query -W -f '${Version}' nohop)" = "$old" ] || fail "the image has $old" "$(dpkg-query -W nohop)"
check "dpkg upgrade under load loses nothing" "under_load upgrade"
has_fields() {
    local fields
    fields=$(journalctl -q --no-pager -o json -u nohop.service _COMM=nohop | head -2000)
    grep -q '"SYSLOG_IDENTIFIER":"nohop"' <<< "$fields" || { head -1 <<< "$fields"; return 1; }
    grep -q '"PRIORITY":"6"' <<< "$fields" || { echo "nothing has priority 6"; return 1; }
    grep -q '"PRIORITY":"[345]"' <<< "$fields" || { echo "nothing has priority 3, 4 or 5"; return 1; }
    ! grep -q '\\u001b' <<< "$fields"
}
check "the journal has fields and priorities, and no escape sequences" has_fields
gone() {
    [ ! -e /sys/fs/bpf/nohop ] || { echo "pins: $(ls -R /sys/fs/bpf/nohop)"; return 1; }
    ! ip route show table all | grep -q unreachable.*127.128 || { ip route show table all; return 1; }
    ! curls > /dev/null 2>&1
}
removed() {
    dpkg -r nohop > /run/remove.log 2>&1 || { cat /run/remove.log; return 1; }
    [ "$(systemctl is-active nohop.service nohop.socket | tr '\n' ' ')" = "inactive inactive " ] || return 1
    [ -e /etc/nohop/nohop.toml ] && gone
}
check "dpkg removal leaves nothing in the kernel, and the configuration" removed
purged() { dpkg -P nohop > /dev/null && [ ! -e /etc/nohop ] && [ ! -e /var/lib/nohop ]; }
check "dpkg purge leaves no files" purged

# --- the README's installation, word for word

now() { echo "${EPOCHREALTIME/[.,]/}"; }
ms_since() { echo $((($(now) - $1) / 1000)); }
install() { readme "apt install ./nohop_0.1.0_amd64.deb"; }
before=$(now)
check "README: apt install" install
note "apt install: $(ms_since "$before") ms, emulated"
checks() { readme "nohop check"; }
check "README: nohop check" checks
inactive() { [ "$(systemctl is-enabled nohop.service nohop.socket | tr '\n' ' ')" = "disabled disabled " ] && ! is_serving; }
check "the package starts and enables nothing" inactive
shadow() {
    readme "nohop run --shadow" > /run/shadow.log 2>&1 &
    until_ 240 lists
    local status=$?
    readme "nohop services"
    # The shell's child; the unit doesn't run.
    kill "$(pgrep -x nohop)"
    wait
    [ $status = 0 ] || { cat /run/shadow.log; return 1; }
    nohop unload --all
}
lists() { readme "nohop services" | grep -q '^helloworld'; }
check "README: shadow mode" shadow
enabled() { readme "systemctl enable --now nohop.socket nohop.service" && ready && is_answered; }
before=$(now)
check "README: systemctl enable --now" enabled
note "from enabling to the first response: $(ms_since "$before") ms, emulated"

# --- removal while the configuration has mistakes, of which the unloading with defaults knows nothing

removed_broken() {
    echo 'nonsense = 1' >> /etc/nohop/nohop.toml
    removed || return 1
    ! grep 'still attached' /run/remove.log && [ ! -e /var/lib/nohop/nohop ] || return 1
    sed -i '$d' /etc/nohop/nohop.toml
    dpkg -i "nohop_${new}_amd64.deb" > /run/again.log 2>&1 || { cat /run/again.log; return 1; }
}
check "dpkg removal with mistakes in the configuration leaves nothing in the kernel" removed_broken

# --- an older daemon runs from another path

other_path() {
    systemctl disable --now nohop.socket nohop.service 2> /dev/null
    cp /usr/bin/nohop /usr/local/bin/nohop
    systemd-run --quiet --unit=older /usr/local/bin/nohop run || return 1
    ready && is_answered || return 1
    dpkg -i "nohop_${new}_amd64.deb" > /run/again.log 2>&1 || { cat /run/again.log; return 1; }
    grep -q "process $(show older.service MainPID) runs /usr/local/bin/nohop" /run/again.log || { cat /run/again.log; return 1; }
    is_answered
}
check "a package over a daemon that runs from another path reports it" other_path
second() {
    local start
    start=$(since)
    systemctl start nohop.service 2> /dev/null
    local log
    log=$(journal "$start" -u nohop.service)
    systemctl stop nohop.service nohop.socket
    is_answered || { echo "the older daemon doesn't serve"; return 1; }
    grep -q "/run/nohop/admin.sock\|stop it" <<< "$log" || { echo "$log"; return 1; }
}
check "the second daemon doesn't start, and names the first" second
left_attached() {
    dpkg -r nohop > /run/remove.log 2>&1 || { cat /run/remove.log; return 1; }
    grep -q 'still attached' /run/remove.log && grep -q 'run: .*unload --all' /run/remove.log || { cat /run/remove.log; return 1; }
    ready && is_answered
}
ready_by_other() { /usr/local/bin/nohop status --wait-ready --timeout 240 > /dev/null; }
ready() { ready_by_other; }
check "removal leaves the older daemon alone, and reports what stays attached" left_attached
detached_by_hand() {
    systemctl stop older.service
    is_answered || { echo "the kernel doesn't keep serving"; return 1; }
    sh -c "$(sed -n 's/^ *run: //p' /run/remove.log)" || return 1
    gone
}
check "what it reports detaches the rest" detached_by_hand

journalctl --sync
sleep 2
echo "machine: END"
grep -qw nohop.shell /proc/cmdline || systemctl poweroff --force
