// Fetches http://NAME/ by http.get, and by fetch where Node has it, and prints both answers.
const http = require("http");

const url = `http://${process.argv[2]}/`;

function byHttpGet() {
  return new Promise((resolve, reject) => {
    const request = http.get(url, { timeout: 5000 }, (answer) => {
      let body = "";
      answer.on("data", (part) => (body += part));
      answer.on("end", () => resolve(body));
    });
    request.on("error", reject);
    request.on("timeout", () => request.destroy(new Error("timeout")));
  });
}

async function main() {
  process.stdout.write("http.get: " + (await byHttpGet()));
  if (typeof fetch === "function") {
    process.stdout.write("fetch: " + (await (await fetch(url)).text()));
  }
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
