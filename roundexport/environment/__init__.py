"""What the process runs in: threads, memory, versions of libraries, OpenVINO without its telemetry."""
