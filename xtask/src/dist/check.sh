# Runs in a Debian of its own: `check.sh OLD-VERSION NEW-VERSION`.
set -eu
old=$1 new=$2
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin

fail() {
    echo "$1" >&2
    exit 1
}

# What the package would warn of.
mkdir -p /etc/systemd/system
echo '[Unit]' > /etc/systemd/system/nohop.service
dpkg -i /old.deb > /installed 2>&1 || fail "$(cat /installed)"
grep -q '/etc/systemd/system/nohop.service overrides' /installed || fail "no warning of a unit by hand"
grep -q 'enable --now nohop.socket nohop.service' /installed || fail "no word on how to start it"
rm /etc/systemd/system/nohop.service
dpkg-query -W -f '${Version}' nohop | grep -qx "$old" || fail "the old version isn't installed"

grep -q . /etc/nohop/nohop.toml || fail "there is no configuration file"
printf 'shadow = true # for now\n[plane]\nmax_services = 5000\n[catalog]\nsource = "consul"\n' > /etc/nohop/nohop.toml
dpkg -i /new.deb > /upgraded 2>&1 || fail "$(cat /upgraded)"
nohop version | grep -qx "nohop $new" || fail "the new version isn't installed"
nohop config check || fail "the configuration wasn't migrated"
grep -q '^\[datapath\]$' /etc/nohop/nohop.toml || fail "[plane] is still there"
grep -q '^shadow = true # for now$' /etc/nohop/nohop.toml || fail "another line changed"
grep -q '^\[plane\]$' /etc/nohop/nohop.toml.old || fail "the former file is gone"

# A file with a mistake of its own is left, and the upgrade succeeds.
printf '[plane]\nmax_services = "many"\n' > /etc/nohop/nohop.toml
dpkg -i /new.deb > /again 2>&1 || fail "$(cat /again)"
grep -q 'has mistakes' /again || fail "no word of the mistake: $(cat /again)"
grep -q '^\[plane\]$' /etc/nohop/nohop.toml || fail "a file with mistakes was changed"

for file in /usr/lib/systemd/system/nohop.service /usr/lib/systemd/system/nohop.socket \
    /usr/share/bash-completion/completions/nohop /usr/share/zsh/vendor-completions/_nohop \
    /usr/share/fish/vendor_completions.d/nohop.fish /usr/share/nohop/prometheus/nohop.rules.yml \
    /usr/share/nohop/grafana/nohop.json; do
    [ -f $file ] || fail "$file isn't there"
done
grep -q '^ExecStart=/usr/bin/nohop run$' /usr/lib/systemd/system/nohop.service || fail "the unit starts another binary"
bash -c '. /usr/share/bash-completion/completions/nohop && complete -p nohop' > /dev/null || fail "bash completes nothing"
dpkg --verify nohop | grep . && fail "files differ from the package's"

# The file still has its mistake, so the script before removal unloads once more, as with defaults.
mkdir -p /var/lib/nohop
dpkg -r nohop > /removed 2>&1 || fail "$(cat /removed)"
grep -q 'max_services' /removed || fail "the first unloading didn't meet the mistake: $(cat /removed)"
[ ! -e /var/lib/nohop/nohop ] || fail "what unloads later was kept, though nothing is attached: $(cat /removed)"
[ ! -e /usr/bin/nohop ] || fail "the binary is still there"
[ -e /etc/nohop/nohop.toml ] || fail "removal took the configuration"
dpkg -P nohop > /purged 2>&1 || fail "$(cat /purged)"
[ ! -e /etc/nohop ] || fail "purge left $(ls -A /etc/nohop)"
[ ! -e /var/lib/nohop ] || fail "purge left the state"
cat /removed
