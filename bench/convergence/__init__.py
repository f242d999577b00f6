"""The convergence study: which compression and which synchronization of momentum lose nothing against plain Lion."""
