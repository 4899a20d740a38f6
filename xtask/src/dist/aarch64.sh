#!/bin/busybox sh
# The init of a VM of aarch64: the daemon with a static catalog, and a connection by name. aarch64.rs adds what
# prints the exit status and ends the VM.
export PATH=/usr/bin:/bin
/bin/busybox mkdir -p /dev /etc/nohop /proc /run /sys /tmp /var/lib/nohop /www
/bin/busybox --install -s /bin
mount -t devtmpfs devtmpfs /dev
exec < /dev/null > /dev/console 2>&1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf -o mode=0700 bpf /sys/fs/bpf
for module in /modules/*; do insmod "$module"; done
ip link set lo up

hello() {
    echo "hello from $(uname -m)" > /www/index.html
    httpd -p 127.0.0.1:8080 -h /www || return
    cat > /etc/catalog.toml <<'END'
[[service]]
name = "helloworld"
[[service.backend]]
address = "127.0.0.1:8080"
END
    nohop version || return
    nohop run --catalog /etc/catalog.toml > /tmp/log 2>&1 &
    nohop status --wait-ready --timeout 600 || { nohop status; cat /tmp/log; return 1; }
    nohop status
    nslookup -type=a helloworld.service 127.0.0.1 > /tmp/answer || { cat /tmp/answer; return 1; }
    address=$(sed -n 's/^Address: *\(127\.[0-9.]*\)$/\1/p' /tmp/answer)
    [ "$(wget -q -O - "http://$address/")" = "hello from aarch64" ] || { cat /tmp/answer /tmp/log; return 1; }
    nohop services
}
hello
