"""A small network learns handwritten digits; before.py and after.py do the same."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from drivetrain import initialize

images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = images.float() / 16
data = torch.utils.data.TensorDataset(images, labels)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, _, loader, _ = initialize(None, model, optimizer, None, data, config="examples/plain.json")
criterion = nn.CrossEntropyLoss()

for epoch in range(5):
    for inputs, targets in loader:
        loss = criterion(model(inputs), targets)
        model.backward(loss)
        model.step()
    accuracy = (model(images).argmax(1) == labels).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.4f}, accuracy {accuracy:.4f}")
