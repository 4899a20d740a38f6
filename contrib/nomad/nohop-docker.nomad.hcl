# The same from the container image, where raw_exec isn't allowed. The client's configuration needs:
#
#   plugin "docker" {
#     config {
#       volumes { enabled = true }
#       # The list replaces the driver's own, whose capabilities other tasks rely on: those come first.
#       allow_caps = ["audit_write", "chown", "dac_override", "fowner", "fsetid", "kill", "mknod",
#         "net_bind_service", "setfcap", "setgid", "setpcap", "setuid", "sys_chroot",
#         "bpf", "perfmon", "net_admin", "sys_admin", "sys_ptrace", "dac_read_search"]
#     }
#   }

variable "image" {
  type        = string
  description = "Such as registry.example/nohop:0.1.0"
}

job "nohop" {
  type     = "system"
  priority = 90

  constraint {
    attribute = "${attr.kernel.name}"
    value     = "linux"
  }
  # Linux 5.10 or later: versions such as 5.14.0-427.el9.x86_64 are no semantic ones.
  constraint {
    attribute = "${attr.kernel.version}"
    operator  = "regexp"
    value     = "^(5\\.[1-9][0-9]|[6-9]|[1-9][0-9])\\."
  }
  constraint {
    attribute = "${attr.cpu.arch}"
    value     = "amd64"
  }

  update {
    max_parallel     = 1
    min_healthy_time = "10s"
    auto_revert      = true
  }

  group "nohop" {
    restart {
      delay    = "1s"
      mode     = "delay"
      attempts = 20
      interval = "5m"
    }

    network {
      mode = "host"
    }

    task "nohop" {
      driver = "docker"
      user   = "root"

      config {
        image        = var.image
        network_mode = "host"
        # In a cgroup namespace of its own it would serve itself alone, so it refuses to start there.
        cgroupns = "host"
        cap_drop = ["all"]
        # The last three disconnect UDP sockets whose backend left (docs/security.md).
        cap_add = ["bpf", "perfmon", "net_admin", "net_bind_service", "sys_admin", "sys_ptrace", "dac_read_search"]
        # Docker's AppArmor profile refuses to write below /sys/fs/bpf.
        security_opt = ["apparmor=unconfined"]
        # Before 5.11 maps count as locked memory.
        ulimit { memlock = "-1" }
        # To find sockets of other processes.
        pid_mode = "host"
        volumes = [
          "/sys/fs/bpf:/sys/fs/bpf", # pins outlive the container
          "/sys/fs/cgroup:/sys/fs/cgroup",
          "/var/lib/nohop:/var/lib/nohop",
          "/run/nohop:/run/nohop", # `nohop status` on the node
          "/etc/resolv.conf:/etc/resolv.conf:ro",
          "local/nohop.toml:/etc/nohop/nohop.toml:ro",
        ]
      }

      template {
        destination = "local/nohop.toml"
        change_mode = "restart"
        data        = <<-EOF
          [dns]
          # See docs/nomad.md, step 1; in the place of 192.0.2.53 your resolver, as the host's resolv.conf has
          # nohop alone.
          listen  = ["169.254.53.53:53"]
          forward = ["192.0.2.53:53"]
          EOF
      }

      kill_timeout = "5s"

      resources {
        cpu        = 100
        memory     = 128
        memory_max = 512
      }
    }
  }
}
