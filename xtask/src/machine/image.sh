#!/bin/sh
# Runs in the image's own root: `image.sh OLD NEW`. Installs the package of the version OLD, with what it
# serves, as a node would have them.
set -eu
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin

# As on a machine that booted before: presets aren't applied.
echo 0123456789abcdef0123456789abcdef > /etc/machine-id
echo machine > /etc/hostname
echo '127.0.0.1 localhost machine' > /etc/hosts
rm -f /etc/resolv.conf
echo 'nameserver 127.0.0.1' > /etc/resolv.conf
systemctl disable systemd-resolved.service 2> /dev/null
# Nothing logs in, and nothing is updated.
systemctl mask getty@tty1.service serial-getty@ttyS0.service apt-daily.timer apt-daily-upgrade.timer \
    dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer 2> /dev/null

unit() { cat > "/etc/systemd/system/$1"; }
unit network-card.service <<'END'
[Unit]
Description=The network card, which ends here
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -ec 'ip link add eth0 type dummy; ip address add 10.9.0.1/24 dev eth0; ip link set eth0 up'
[Install]
WantedBy=multi-user.target
END
unit consul.service <<'END'
[Unit]
Description=Consul
After=network-card.service
[Service]
ExecStart=/usr/local/bin/consul agent -dev -bind=10.9.0.1 -client=127.0.0.1 -config-dir=/etc/consul.d
[Install]
WantedBy=multi-user.target
END
unit hello@.service <<'END'
[Unit]
Description=helloworld, instance %i
After=network-card.service
[Service]
ExecStart=/bin/sh -c 'case %i in a) port=8081 ;; b) port=8082 ;; esac; exec /usr/local/bin/nohop-load hello 10.9.0.1:$port --name hello-%i'
[Install]
WantedBy=multi-user.target
END
for name in nomad docker; do
    unit $name.service <<'END'
[Unit]
Description=A stand-in that only starts
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
[Install]
WantedBy=multi-user.target
END
done
unit nohop-machine.service <<END
[Unit]
Description=What is tried on this machine
After=nohop.service nomad.service docker.service consul.service hello@a.service hello@b.service
[Service]
ExecStart=/bin/bash /packages/guest.sh $1 $2
[Install]
WantedBy=multi-user.target
END
unit shell.service <<'END'
[Unit]
Description=A shell for who finds out why a check fails
ConditionKernelCommandLine=nohop.shell
[Service]
ExecStart=/bin/bash -l
WorkingDirectory=/packages
StandardInput=tty
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS3
Restart=always
[Install]
WantedBy=multi-user.target
END
# Emulated, it takes long to load programs.
mkdir -p /etc/systemd/system/nohop.service.d
printf '[Service]\nTimeoutStartSec=15min\n' > /etc/systemd/system/nohop.service.d/emulated.conf
mkdir -p /etc/consul.d
for name in a:8081 b:8082; do
    cat > "/etc/consul.d/hello-${name%:*}.json" <<END
{"service": {"id": "hello-${name%:*}", "name": "helloworld", "port": ${name#*:}, "tags": ["routed"],
             "check": {"tcp": "10.9.0.1:${name#*:}", "interval": "2s"}}}
END
done
dpkg -i "/packages/nohop_$1_amd64.deb"
systemctl enable network-card.service consul.service hello@a.service hello@b.service nomad.service docker.service \
    nohop.socket nohop.service nohop-machine.service shell.service 2> /dev/null
