"""For tests of distributed behaviour: real ranks that are started once and used many times."""
