"""Images that clients send. Their bytes are hostile until `headers` and `decode` have been through them."""
