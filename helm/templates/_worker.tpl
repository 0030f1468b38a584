{{- define "m3serve.workerGroup" -}}
{{- $worker := .Values.worker -}}
{{- $device := index .Values.accelerators .Values.accelerator -}}
{{- $resources := deepCopy $worker.resources -}}
{{- if gt (int64 $worker.gpus) 0 -}}
{{- range $name := list "requests" "limits" -}}
{{- $_ := set $resources $name (merge (dict $device.resourceName (int64 $worker.gpus)) (index $resources $name | default dict)) -}}
{{- end -}}
{{- end -}}
groupName: {{ .Values.accelerator }}
replicas: {{ $worker.replicas }}
minReplicas: {{ ternary ($worker.minReplicas | default 0) $worker.replicas .Values.autoscaling.enabled }}
maxReplicas: {{ ternary ($worker.maxReplicas | default $worker.replicas) $worker.replicas .Values.autoscaling.enabled }}
rayStartParams:
  num-cpus: {{ include "m3serve.cpus" $worker.resources | quote }}
  num-gpus: {{ $worker.gpus | int64 | quote }}
  object-store-memory: {{ mul (int64 $worker.objectStoreGiB) 1073741824 | quote }}
template:
  metadata:
    labels:
      {{- include "m3serve.podLabels" . | nindent 6 }}
      app.kubernetes.io/component: worker
      {{- with $worker.podLabels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $worker.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    {{- include "m3serve.podCommon" . | nindent 4 }}
    automountServiceAccountToken: false
    {{- with include "m3serve.scheduling" $worker | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- if or $worker.initContainers (eq .Values.model.weights.source "download") }}
    initContainers:
      {{- if eq .Values.model.weights.source "download" }}
      - {{ include "m3serve.downloadContainer" . | nindent 8 | trim }}
      {{- end }}
      {{- with $worker.initContainers }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- end }}
    containers:
      - name: ray-worker
        image: {{ include "m3serve.image" . }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        env:
          {{- include "m3serve.env" . | nindent 10 }}
          {{- with $worker.env }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        {{- with $worker.envFrom }}
        envFrom:
          {{- toYaml . | nindent 10 }}
        {{- end }}
        ports:
          {{- include "m3serve.servePorts" . | nindent 10 }}
        {{- with include "m3serve.probes" $worker | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        securityContext:
          {{- include "m3serve.workerSecurityContext" . | nindent 10 }}
        resources:
          {{- toYaml $resources | nindent 10 }}
        volumeMounts:
          - {{ include "m3serve.weightsMount" (dict "root" . "writable" false) | nindent 12 | trim }}
          - name: shm
            mountPath: /dev/shm
          - name: ray-tmp
            mountPath: /tmp/ray
          {{- if .Values.monitoring.exporter.enabled }}
          - name: metrics-shm
            mountPath: {{ .Values.monitoring.exporter.directory }}
          {{- end }}
          {{- if .Values.apiKeys.existingSecret }}
          # The whole volume: a single file of it would not follow the secret.
          - name: api-keys
            mountPath: {{ include "m3serve.apiKeysPath" . }}
            readOnly: true
          {{- end }}
          {{- with $worker.volumeMounts }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
      {{- if .Values.monitoring.exporter.enabled }}
      - {{ include "m3serve.exporterContainer" . | nindent 8 | trim }}
      {{- end }}
      {{- with $worker.sidecars }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    volumes:
      - {{ include "m3serve.weightsVolume" . | nindent 8 | trim }}
      - name: shm
        emptyDir:
          medium: Memory
          sizeLimit: {{ $worker.shmSize }}
      - name: ray-tmp
        emptyDir: {}
      {{- if .Values.monitoring.exporter.enabled }}
      - name: metrics-shm
        emptyDir:
          medium: Memory
          sizeLimit: {{ .Values.monitoring.exporter.sizeLimit }}
      {{- end }}
      {{- if .Values.apiKeys.existingSecret }}
      - name: api-keys
        secret:
          secretName: {{ .Values.apiKeys.existingSecret }}
          defaultMode: 0440
          items:
            - key: {{ .Values.apiKeys.key }}
              path: keys
      {{- end }}
      {{- with $worker.volumes }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
{{- end -}}
