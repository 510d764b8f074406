"""What a transport costs on top of what carries its bytes: dnipipe's beside raw pyzmq and raw gloo."""
