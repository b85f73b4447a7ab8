"""What tests share: builders of models, adapters and engines, stand-ins for servers and devices. No file here is a test."""
