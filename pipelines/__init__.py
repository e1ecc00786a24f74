"""Prefect flows over the stages of DVC: when and whether they run, never what they compute."""
