"""What is to be trained: types and limits, the values chosen, the stages that follow."""
