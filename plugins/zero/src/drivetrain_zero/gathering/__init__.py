"""Units that are whole while they compute, and only then: stage 3."""
