# What nohop serves: three instances behind one name, `curl http://helloworld.service/` from any process of the
# cluster's nodes. The update replaces them one by one, with a canary that gets nothing before its promotion.

job "helloworld" {
  group "web" {
    count = 3

    network {
      port "http" {}
    }

    update {
      max_parallel     = 1
      canary           = 1
      min_healthy_time = "5s"
    }

    # Nomad deregisters and kills at once without it. nohop knows of a deregistration within milliseconds, but
    # other nodes' agents take up to a second, and a client may have chosen already.
    shutdown_delay = "3s"

    service {
      name     = "helloworld"
      port     = "http"
      tags     = ["routed"]
      # Without the tag nohop sends a canary nothing.
      canary_tags = ["canary"]

      # Without a check an instance is passing before its task listens.
      check {
        type     = "http"
        path     = "/"
        interval = "5s"
        timeout  = "1s"
      }
    }

    task "server" {
      driver = "docker"

      config {
        image = "busybox:1"
        ports = ["http"]
        command = "sh"
        args = ["-c", "mkdir -p /www && echo hello from $NOMAD_SHORT_ALLOC_ID > /www/index.html && exec httpd -f -p $NOMAD_PORT_http -h /www"]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
