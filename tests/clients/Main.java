import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.HttpURLConnection;
import java.net.Socket;
import java.net.URL;

/** Fetches http://NAME/ by HttpURLConnection and by a plain socket, and prints both answers. */
public class Main {
    public static void main(String[] arguments) throws Exception {
        String name = arguments[0];

        URL url = new URL("http://" + name + "/");
        HttpURLConnection connection = (HttpURLConnection) url.openConnection();
        connection.setConnectTimeout(5000);
        connection.setReadTimeout(5000);
        try (BufferedReader body = reader(connection.getInputStream())) {
            System.out.println("HttpURLConnection: " + body.readLine());
        }

        try (Socket socket = new Socket(name, 80)) {
            socket.setSoTimeout(5000);
            socket.getOutputStream().write("GET / HTTP/1.0\r\n\r\n".getBytes());
            try (BufferedReader answer = reader(socket.getInputStream())) {
                String last = null;
                for (String line; (line = answer.readLine()) != null; last = line) {}
                System.out.println("Socket: " + last);
            }
        }
    }

    private static BufferedReader reader(java.io.InputStream stream) {
        return new BufferedReader(new InputStreamReader(stream));
    }
}
