"""Figures of BENCHMARKS.md files as claims that can be measured again."""
