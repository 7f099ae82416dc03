"""OpenVINO target."""
