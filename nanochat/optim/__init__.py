"""The optimizer: MuonAdamW (muon_adamw.py), its stacks and update rules, and the settings and schedules.

Commands import nanochat.optim.schedule for --help, which must not load torch: this file imports nothing.
"""
