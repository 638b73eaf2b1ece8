"""Decision makers: events, log, registry, policies, learners. No torch."""
