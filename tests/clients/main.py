"""Fetches http://NAME/ by urllib, by http.client, and by an IPv6 socket that dials the IPv4 address
in IPv6's form, and prints the three answers."""

import http.client
import socket
import sys
import urllib.request

name = sys.argv[1]

with urllib.request.urlopen(f"http://{name}/", timeout=5) as answer:
    print("urllib:", answer.read().decode().strip())

connection = http.client.HTTPConnection(name, timeout=5)
connection.request("GET", "/")
print("http.client:", connection.getresponse().read().decode().strip())

address = socket.gethostbyname(name)
dual = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
dual.settimeout(5)
dual.connect((f"::ffff:{address}", 80))
assert dual.getpeername()[0] == f"::ffff:{address}", dual.getpeername()
dual.sendall(b"GET / HTTP/1.0\r\n\r\n")
print("dual-stack:", b"".join(iter(lambda: dual.recv(4096), b"")).decode().strip().splitlines()[-1])
