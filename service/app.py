"""The Serve application: ingress replicas in front of engine replicas. `import_path: service.app:build`.

`service.ingress.Ingress` is the FastAPI class (decorated with `@serve.ingress`, not with `@serve.deployment`);
its constructor is `Ingress(settings: ServiceSettings, engine: DeploymentHandle)`.
"""
