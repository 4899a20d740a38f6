# Clients: a task in a bridge-mode group, and one of Docker in a network of its own. Neither has a `dns` block.

job "clients" {
  type = "batch"

  group "bridge" {
    network {
      mode = "bridge"
    }

    task "curl" {
      driver = "docker"

      config {
        image   = "curlimages/curl:8.14.1"
        command = "curl"
        args    = ["--silent", "--show-error", "--max-time", "5", "http://helloworld.service/"]
      }
    }
  }

  group "docker" {
    task "curl" {
      driver = "docker"

      config {
        image   = "curlimages/curl:8.14.1"
        command = "curl"
        args    = ["--silent", "--show-error", "--max-time", "5", "http://helloworld.service/"]
      }
    }
  }
}
