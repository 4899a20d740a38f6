# nohop on every Linux client, as a system job. docs/nomad.md has the reasons; under systemd the package's
# units are the better choice, since systemd holds the sockets of DNS.
#
#   nomad job run -var version=0.1.0 -var url=https://files.example/nohop -var sha256=... contrib/nomad/nohop.nomad.hcl
#
# The client's configuration has to allow raw_exec: plugin "raw_exec" { config { enabled = true } }

variable "version" {
  type = string
}

variable "url" {
  type        = string
  description = "Where nohop-VERSION-x86_64-static.tar.gz lies"
}

variable "sha256" {
  type        = string
  description = "Its sum, of SHA256SUMS"
}

job "nohop" {
  type     = "system"
  priority = 90 # before the jobs that need its names

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

  # One node after the other, each only once the one before is ready.
  update {
    max_parallel     = 1
    health_check     = "checks"
    min_healthy_time = "10s"
    healthy_deadline = "2m"
    auto_revert      = true
  }

  group "nohop" {
    # Restarts after 1 s; after 20 within 5 minutes Nomad waits for the interval's end. By default it would wait
    # 15 s each time and then give up. The kernel keeps serving meanwhile, but names of other zones fail.
    restart {
      delay    = "1s"
      mode     = "delay"
      attempts = 20
      interval = "5m"
    }

    network {
      mode = "host"
    }

    service {
      name     = "nohop"
      provider = "consul"

      # Not ready is a warning to Nomad; don't update the job while the kill switch is on.
      check {
        type     = "script"
        task     = "nohop"
        command  = "local/nohop-${var.version}-x86_64-static/nohop"
        args     = ["status"]
        interval = "10s"
        timeout  = "5s"
      }
    }

    task "nohop" {
      driver = "raw_exec"
      user   = "root"

      artifact {
        source      = "${var.url}/nohop-${var.version}-x86_64-static.tar.gz"
        destination = "local"

        options {
          checksum = "sha256:${var.sha256}"
          archive  = "tar.gz"
        }
      }

      config {
        command = "local/nohop-${var.version}-x86_64-static/nohop"
        args    = ["run", "--config", "${NOMAD_TASK_DIR}/nohop.toml"]
      }

      # Pins and state are the host's (/sys/fs/bpf/nohop, /var/lib/nohop), so that the next allocation takes
      # them over. The admin socket has the usual place: `nohop status` on the node finds it.
      template {
        destination   = "local/nohop.toml"
        change_mode   = "script"
        data          = <<-EOF
          [dns]
          # See docs/nomad.md, step 1; in the place of 192.0.2.53 your resolver, as the host's resolv.conf has
          # nohop alone.
          listen  = ["169.254.53.53:53"]
          forward = ["192.0.2.53:53"]
          [consul]
          address = "http://127.0.0.1:8500"
          EOF

        change_script {
          command       = "local/nohop-${var.version}-x86_64-static/nohop"
          args          = ["reload"]
          timeout       = "70s"
          fail_on_error = false
        }
      }

      # It ends within a second; connections and names continue without it.
      kill_signal  = "SIGTERM"
      kill_timeout = "5s"

      resources {
        cpu    = 100
        memory = 128
        # The maps (38 MB, 44 with vip.pool6) are charged to no cgroup; a first sync of 10,000 services peaks.
        memory_max = 512
      }
    }
  }
}
