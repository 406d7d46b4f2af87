"""What travels in fewer bits: ZeRO++ and error feedback."""
