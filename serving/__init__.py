"""The online decision service: HTTP, the relay to Kafka, pages for people."""
