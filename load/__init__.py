"""Load runs against a gateway and a simulator that they start themselves: programs, see README.md."""
