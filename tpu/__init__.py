"""What a TPU would say, without one: programs compiled by libtpu for chips that are not there, and priced."""
