"""The node daemon: one engine, the adapters it holds, and the services that clients reach."""
